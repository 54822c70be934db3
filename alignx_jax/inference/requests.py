"""Requests as JSON: a post, a persona, how to sample; and the prompts that they stand for.

A request has the fields of a published record (data/records.py), of which the post ("prompt") must
be there and the persona where the policy needs one: so the records of a data set are requests. It
may have those of prompts.Sampling too, "id", and

  "preferences"  poles and strengths, {"Likes humor": 1.0}, that P̃ is steered to
  "judge"        a persona, an object of the same fields: Persona-judge answers for both

What else it has is handed on to its answer. An answer's "request" (request_key) says what was asked
and by whom, so that answers of several policies can be compared.
"""

import dataclasses
import hashlib
import json
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from alignx_jax.data.formatting import Formatting, Refused, condition_of, prompt_ids
from alignx_jax.data.records import (
  COMMENTS,
  DESCRIPTION,
  DIRECTIONS,
  PAIRS,
  Example,
  RecordError,
  parse_record,
)
from alignx_jax.inference.prompts import Prompt, Sampling
from alignx_jax.personas.distribution import Preferences
from alignx_jax.personas.persona import Persona
from alignx_jax.personas.preferences import PreferenceSpace
from alignx_jax.personas.simulator import simulate_record

SIMULATED = "simulated_test:"  # begins the ids of simulated users' requests
PERSONA_FIELDS = (COMMENTS, PAIRS, DESCRIPTION, DIRECTIONS, "profile")
_SAMPLING = tuple(field.name for field in dataclasses.fields(Sampling))
_KNOWN = ("prompt", "id", "chosen", "rejected", "preferences", "judge", *PERSONA_FIELDS, *_SAMPLING)


@dataclasses.dataclass(frozen=True)
class Request:
  """A post and for whom it is to be answered.

  Attributes:
    where: "file:line", for messages.
    example: the post, the persona and what is known of P̃; without responses.
    strengths: of poles, to which P̃ is steered.
    judge: of whom the second persona is; None for none.
    asked: request_key.
    rest: fields that mean nothing here.
  """

  where: str
  example: Example
  sampling: Sampling
  strengths: Mapping[str, float] = dataclasses.field(default_factory=dict)
  judge: "Request | None" = None
  id: Any = None
  asked: str = ""
  rest: Mapping[str, Any] = dataclasses.field(default_factory=dict)


def request_key(record: dict) -> str:
  """Stands for what was asked and by whom: the same whichever policy answers, and however."""
  asked = {name: record.get(name) for name in ("prompt", *PERSONA_FIELDS)}
  text = json.dumps(asked, sort_keys=True, default=lambda x: x.tolist())  # of NumPy's arrays
  return hashlib.sha256(text.encode()).hexdigest()[:16]


def parse_line(line: str, space: PreferenceSpace, where: str, sampling: Sampling) -> Request:
  """A request from a line of a file.

  Raises:
    RecordError: names the line, the field, what is wrong and what to do.
  """
  try:
    record = json.loads(line)
  except ValueError as error:
    raise RecordError(where, "", f"is not JSON ({error}); make it one object a line.") from None
  return parse_request(record, space, where, sampling)


def parse_request(record: dict, space: PreferenceSpace, where: str, sampling: Sampling) -> Request:
  """A request from a mapping.

  Args:
    sampling: where the request does not say.
  Raises:
    RecordError: names `where`, the field, what is wrong and what to do.
  """
  if not isinstance(record, dict):
    raise RecordError(where, "", f"the request is a {type(record).__name__}; make it an object.")
  # The schema wants responses too, which are still to come.
  example = parse_record(record | {"chosen": "-", "rejected": "-"}, space, where)
  own = {name: record[name] for name in _SAMPLING if name in record}
  try:
    sampling = dataclasses.replace(sampling, **own)
  except ValueError as error:
    raise RecordError(where, str(error).split()[0], str(error).split(" ", 1)[1]) from None
  strengths = record.get("preferences") or {}
  if not isinstance(strengths, dict):
    raise RecordError(where, "preferences", "is no object; make it one of poles and strengths.")
  try:
    Preferences.neutral(space).with_preferences(strengths)
  except ValueError as error:
    raise RecordError(where, "preferences", f"does not fit: {error}") from None
  judge = record.get("judge")
  if judge is not None:
    if not isinstance(judge, dict):
      raise RecordError(where, "judge", f"is a {type(judge).__name__}; make it a persona's object.")
    of_judge = {name: judge[name] for name in (*PERSONA_FIELDS, "preferences") if name in judge}
    if unknown := sorted(set(judge) - set(of_judge)):
      raise RecordError(where, f"judge.{unknown[0]}", "is of no persona; remove it.")
    judge = parse_request(of_judge | {"prompt": example.post}, space, f"{where} (judge)", sampling)
  rest = {name: value for name, value in record.items() if name not in _KNOWN}
  asked = request_key(record)
  return Request(where, example, sampling, strengths, judge, record.get("id"), asked, rest)


def simulated_requests(users: int, *, seed: int, sampling_seed: int = 0) -> list[dict]:
  """The posts of the first simulated test users, one of each, as requests.

  Args:
    seed: of the users, config.seed where they are to be those of a config's test split.
    sampling_seed: of the first answer; each next one has the next.
  """
  requests = []
  for i in range(users):
    record = simulate_record(i, split="test", seed=seed)
    del record["chosen"], record["rejected"]
    own = {"id": f"{SIMULATED}{i}", "seed": (sampling_seed + i) % 2**32}
    requests.append(own | record)
  return requests


@dataclasses.dataclass(frozen=True)
class Prompter:
  """Requests to prompts, in the very tokens of training.

  Attributes:
    formatting: as the policy was trained; all of a persona is shown, whatever its history policy.
    infer: personas and posts to P̃ by a learned bridge; None without one.
    threshold: probability from which P̃ is told as text.
    max_positions: of the model.
  """

  formatting: Formatting
  max_positions: int
  infer: Callable[[list[Persona], list[str]], list[Preferences]] | None = None
  threshold: float = 0.3

  def prompts(self, requests: list[Request]) -> list[Prompt | RecordError]:
    """A prompt for each request, or why there is none."""
    inferred: list[Preferences | RecordError | None] = [None] * len(requests)
    found: list[Prompt | RecordError] = []
    checked = [self._check(request) for request in requests]
    if self.infer is not None:
      wanted = [i for i, error in enumerate(checked) if error is None]
      wanted = [i for i in wanted if not self._is_given(requests[i])]
      for i, preferences in zip(wanted, self._inferred([requests[i] for i in wanted]), strict=True):
        inferred[i] = preferences
    for request, error, preferences in zip(requests, checked, inferred, strict=True):
      error = error or (preferences if isinstance(preferences, RecordError) else None)
      found.append(error or self._prompt(request, preferences))
    return found

  def _inferred(self, requests: list[Request]) -> list[Preferences | RecordError]:
    posts = [request.example.post for request in requests]
    personas = [request.example.persona for request in requests]
    try:
      return self.infer(personas, posts) if requests else []
    except ValueError as error:
      if len(requests) == 1:  # a part of the persona is too long
        return [RecordError(requests[0].where, "", str(error))]
      return [x for request in requests for x in self._inferred([request])]

  def _is_given(self, request: Request) -> bool:
    """Whether a request says itself what P̃ is as text."""
    return self.formatting.condition == "profile" and request.example.profile is not None

  def _check(self, request: Request) -> RecordError | None:
    persona, condition = request.example.persona, self.formatting.condition
    if condition == "persona" and not (persona.history or persona.description):
      return RecordError(
        request.where,
        COMMENTS,
        f"is missing or empty, and {PAIRS!r} and {DESCRIPTION!r} are too; this policy reads the "
        "persona (ICA): add one of the three.",
      )
    if request.strengths and self.infer is None:
      return RecordError(
        request.where,
        "preferences",
        "steers P̃ of a learned bridge, and this policy has none; remove it or give a run with "
        "config.bridge.kind 'head'.",
      )
    return None

  def _prompt(self, request: Request, preferences: Preferences | None) -> Prompt | RecordError:
    example, formatting = request.example, self.formatting
    if preferences is not None and request.strengths:
      preferences = preferences.with_preferences(request.strengths)
    told = {}
    if formatting.condition == "profile" and preferences is not None:
      example = dataclasses.replace(example, profile=preferences.verbalise(self.threshold))
    elif preferences is not None:
      told = {"preferences_PK": np.asarray(preferences.probabilities_PK)}
    try:
      condition = condition_of(example, example.persona, formatting)
    except Refused as error:
      return RecordError(
        request.where, DIRECTIONS, f"or 'profile' is missing ({error}); add one of them."
      )
    ids = prompt_ids(example.post, formatting, **condition)
    size, wanted = len(ids) + bool(told), request.sampling.max_new_tokens
    if size + wanted > self.max_positions:
      return RecordError(
        request.where,
        "prompt",
        f"and the persona make {size} tokens, with {wanted} for the response; the model was made "
        f"for {self.max_positions} positions: shorten them, or lower max_new_tokens.",
      )
    group = repr(condition) if condition else None
    if told:
      group = told["preferences_PK"].tobytes()
    return Prompt(ids, request.sampling, group, **told)
