"""Two files of answers, paired by what was asked and by whom."""

import hashlib
import json
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from alignx_jax.data.records import Example, RecordError
from alignx_jax.evaluation.judges.questions import Question
from alignx_jax.inference.prompts import Sampling
from alignx_jax.inference.requests import SIMULATED, parse_request, request_key
from alignx_jax.personas.preferences import PreferenceSpace, alignx_space
from alignx_jax.personas.simulator import simulate_record, simulate_user


class Answer(NamedTuple):
  """A line of a file that alignx_jax.generate wrote.

  Attributes:
    where: "file:line".
    request: inference.requests.request_key of what it answers.
    response: None where there is none; `failure` then says why.
    is_ended: whether it ended by itself.
  """

  where: str
  request: str
  id: Any
  response: str | None
  is_ended: bool = True
  failure: str = ""


class Asked(NamedTuple):
  """A request as a judge needs it.

  Attributes:
    user: stands for the user, the same in all of their requests.
    directions: [P] of a simulated user.
  """

  example: Example
  user: str
  directions: np.ndarray | None = None


class Pair(NamedTuple):
  """Two answers to one request; `question` shows the first as A."""

  first: Answer
  second: Answer
  user: str
  question: Question


def read_answers(path: Path) -> tuple[list[Answer], list[RecordError]]:
  """The answers of a file, and what in it is none.

  Raises:
    FileNotFoundError, ValueError: there is no such file, or nothing in it.
  """
  if not path.is_file():
    raise FileNotFoundError(f"{path} is no file; give what alignx_jax.generate wrote.")
  answers, errors = [], []
  for number, line in enumerate(path.read_bytes().split(b"\n"), start=1):
    if line.strip():
      try:
        answers.append(_parse_answer(line, f"{path.name}:{number}"))
      except RecordError as error:
        errors.append(error)
  if not answers and not errors:
    raise ValueError(f"{path} is empty; write answers to it with alignx_jax.generate.")
  return answers, errors


def _parse_answer(line: bytes, where: str) -> Answer:
  try:
    found = json.loads(line.decode("utf-8"))
  except (ValueError, RecursionError) as error:
    raise RecordError(where, "", f"is not JSON ({error}); generate it again.") from None
  if not isinstance(found, dict):
    raise RecordError(where, "", f"is a {type(found).__name__}; make it an answer, an object.")
  request = found.get("request")
  if not isinstance(request, str) or not request:
    raise RecordError(
      where, "request", "is missing, so nobody knows what it answers; generate it again."
    )
  response, failure = found.get("response"), ""
  if mark := next((m for m in ("failed", "error", "failure") if found.get(m)), None):
    failure = f"is marked {mark!r}: {str(found[mark])[:80]}"
  elif not isinstance(response, str):
    failure = "has no response" if response is None else "has a response that is no text"
  elif not _is_unicode(response):
    failure = "has a response that is not valid Unicode"
  response = None if failure else response
  name = found.get("id")
  name = name if isinstance(name, str | int | None) else repr(name)
  return Answer(where, request, name, response, found.get("ended", True) is not False, failure)


def _is_unicode(text: str) -> bool:
  try:
    text.encode("utf-8")
  except UnicodeEncodeError:
    return False
  return True


def read_requests(path: Path, space: PreferenceSpace) -> tuple[dict[str, Asked], list[RecordError]]:
  """What a JSONL file of requests asks, by request_key, and what in it asks nothing.

  Raises:
    FileNotFoundError: there is no such file.
  """
  if not path.is_file():
    raise FileNotFoundError(f"{path} is no file; give the requests that were answered.")
  asked, errors = {}, []
  for number, line in enumerate(path.read_bytes().split(b"\n"), start=1):
    where = f"{path.name}:{number}"
    if not line.strip():
      continue
    try:
      record = json.loads(line.decode("utf-8", "backslashreplace"))
      # How it is to be sampled is nothing to a judge.
      example = parse_request(record, space, where, Sampling()).example
    except RecordError as error:
      errors.append(error)
    except (ValueError, RecursionError) as error:
      errors.append(RecordError(where, "", f"is not JSON ({error}); make it one object a line."))
    else:
      key = request_key(record)
      asked[key] = Asked(example, _user_key(example, key))
  return asked, errors


def simulated_asked(answers: Sequence[Answer], *, seed: int) -> dict[str, Asked]:
  """What the simulated test users of a seed asked, by request_key, as far as ids name them.

  An id of another seed's user is left out: its key does not fit.
  """
  asked = {}
  for index in sorted({i for answer in answers if (i := _index_of(answer)) is not None}):
    record = simulate_record(index, split="test", seed=seed)
    example = parse_request(record, alignx_space(), f"{SIMULATED}{index}", Sampling()).example
    directions_P = simulate_user(index, split="test", seed=seed).directions
    asked[request_key(record)] = Asked(example, f"{SIMULATED}{index}", directions_P)
  return asked


def _index_of(answer: Answer) -> int | None:
  if not isinstance(answer.id, str) or not answer.id.startswith(SIMULATED):
    return None
  index = answer.id.removeprefix(SIMULATED)
  return int(index) if index.isascii() and index.isdigit() and len(index) < 10 else None


def _user_key(example: Example, request: str) -> str:
  """The same for one persona; who has none is nobody's neighbour."""
  persona = example.persona
  if not (persona.history or persona.description):
    return request
  text = [(c.post, c.comment) for c in persona.comments]
  text += [(p.post, p.chosen, p.rejected) for p in persona.pairs]
  return hashlib.sha256(repr((text, persona.description)).encode()).hexdigest()[:16]


def pair_answers(
  first: Sequence[Answer],
  second: Sequence[Answer],
  asked: Mapping[str, Asked],
  *,
  names: tuple[str, str],
) -> tuple[list[Pair], list[RecordError]]:
  """Answers to the same request, the nth of one file with the nth of the other.

  Args:
    names: of the files, for messages.
  Returns:
    The pairs in the order of the first file; and for each other answer why it has no part in one.
  """
  pairs, errors = [], []
  waiting = defaultdict(list)
  for answer in reversed(second):
    waiting[answer.request].append(answer)
  for one in first:
    if not waiting[one.request]:
      errors.append(_alone(one, names[1]))
      continue
    other = waiting[one.request].pop()
    if failed := [answer for answer in (one, other) if answer.failure]:
      errors += list(_failed(one, other, failed))
    elif one.request not in asked:
      reason = (
        "answers a request of which nothing is known; give --requests, or for simulated users the "
        f"config that they were answered with. {other.where} with it."
      )
      errors.append(RecordError(one.where, "request", reason))
    else:
      example, user, directions_P = asked[one.request]
      question = Question(example, one.response, other.response, directions_P)
      pairs.append(Pair(one, other, user, question))
  left = {answer.where for answers in waiting.values() for answer in answers}
  errors += [_alone(answer, names[0]) for answer in second if answer.where in left]
  return pairs, errors


def _alone(answer: Answer, other: str) -> RecordError:
  if answer.failure:
    return RecordError(answer.where, "", f"{answer.failure}; generate it again.")
  reason = f"has no answer in {other}, to this post of this user; generate it there too."
  return RecordError(answer.where, "request", reason)


def _failed(one: Answer, other: Answer, failed: Sequence[Answer]) -> Iterator[RecordError]:
  for answer in failed:
    rest = "" if len(failed) == 2 else f" {(other if answer is one else one).where} with it."
    yield RecordError(answer.where, "", f"{answer.failure}; generate it again.{rest}")
