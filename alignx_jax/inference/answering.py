"""A file of requests to a file of answers, which a second run of the same goes on with."""

import hashlib
import json
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

from alignx_jax.data.records import RecordError
from alignx_jax.files import write_text
from alignx_jax.inference.persona_judge import Judged, Judging
from alignx_jax.inference.prompts import Generated, Sampling
from alignx_jax.inference.requests import Request, parse_line
from alignx_jax.training import hosts

AT_ONCE = 1024  # requests that are read, sorted by length and answered together


class Told(NamedTuple):
  """What became of a file of requests, by count."""

  answered: int
  kept: int
  refused: int
  output: Path

  @property
  def summary(self) -> str:
    return (
      f"{self.answered:,} answered, {self.kept:,} answered before, {self.refused:,} refused: "
      f"{self.output}"
    )


def answer_file(
  policy,
  requests: Path,
  output: Path,
  sampling: Sampling,
  *,
  judging: Judging | None = None,
  judge: dict | None = None,
) -> Told:
  """Answers a JSONL file of requests; prints those that cannot be answered.

  Answers are appended batch by batch, and put in the order of the requests at the end.

  Args:
    policy: experiments.policies.Policy.
    sampling: where a request does not say.
    judge: the second persona of requests that have none, for Persona-judge.
  Raises:
    FileNotFoundError: there is no such file.
    ValueError: the output has answers to other requests, or by other means.
  """
  if not requests.is_file():
    raise FileNotFoundError(f"{requests} is no file; give --requests a JSONL file.")
  read = lambda: _lines(requests)
  return _answer_lines(policy, read, requests.name, output, sampling, judging, judge)


def answer_requests(
  policy,
  requests: Sequence[dict],
  output: Path,
  sampling: Sampling,
  *,
  name: str,
  judging: Judging | None = None,
  judge: dict | None = None,
) -> Told:
  """The same of requests that are no file.

  Args:
    name: what they are called in messages.
  """
  lines = [(i, json.dumps(request)) for i, request in enumerate(requests, start=1)]
  return _answer_lines(policy, lambda: lines, name, output, sampling, judging, judge)


def _answer_lines(
  policy,
  read: Callable[[], Iterable[tuple[int, str]]],
  name: str,
  output: Path,
  sampling: Sampling,
  judging: Judging | None,
  judge: dict | None,
) -> Told:
  """Answers numbered lines, which are read twice."""
  means = f"{policy.key} {sampling} {judging} {json.dumps(judge, sort_keys=True)}"
  keys = {number: _key(line, number, means) for number, line in read()}
  done = _read_answers(output, set(keys.values()))
  first = hosts.is_first()
  answered = refused = 0
  bar = tqdm(total=len(keys), initial=len(done), unit="answer", disable=not first)
  batch: list[tuple[int, Request]] = []

  def refuse(error: RecordError):
    nonlocal refused
    refused += 1
    if first:
      bar.write(f"Not answered: {error}", file=sys.stderr)

  def flush():
    nonlocal answered
    found = policy.answer([request for _, request in batch], judging=judging)
    for index, response in found:
      number, request = batch[index]
      if isinstance(response, RecordError):
        refuse(response)
        continue
      answer = _answer(policy, request, response) | {"line": number, "key": keys[number]}
      if first:
        with output.open("a", encoding="utf-8", errors="backslashreplace") as file:
          file.write(json.dumps(answer, ensure_ascii=False) + "\n")
      answered += 1
      bar.update()
    batch.clear()

  with bar:
    for number, line in read():
      if keys[number] in done:
        continue
      try:
        request = _parse(line, policy, f"{name}:{number}", sampling, judge)
      except RecordError as error:
        refuse(error)
        continue
      batch.append((number, request))
      if len(batch) == AT_ONCE:
        flush()
    if batch:
      flush()
  if first and output.exists():
    _sort(output)
  return Told(answered, len(done), refused, output)


def stats_of(judged: Judged) -> str:
  """What Persona-judge reports of a response, for people."""
  return f"[{judged.acceptance:.0%} accepted, {judged.passes_per_token:.2f} passes a token]"


def _parse(line: str, policy, where: str, sampling: Sampling, judge: dict | None) -> Request:
  if judge is not None:
    try:
      record = json.loads(line)
    except ValueError:
      record = None  # told below
    if isinstance(record, dict):
      line = json.dumps({"judge": judge} | record)
  return parse_line(line, policy.formatting.space_of_bridge, where, sampling)


def _answer(policy, request: Request, response: Generated | Judged) -> dict:
  judged = response if isinstance(response, Judged) else None
  generated = judged.response if judged else response
  answer = dict(request.rest) | ({} if request.id is None else {"id": request.id})
  answer |= {
    "request": request.asked,
    "prompt": request.example.post,
    "response": policy.text(generated.ids),
    "tokens": generated.tokens,
    "ended": generated.is_ended,
  }
  if judged:
    answer |= {
      "acceptance": round(judged.acceptance, 4),
      "passes_per_token": round(judged.passes_per_token, 4),
    }
  return answer


def _lines(path: Path) -> Iterator[tuple[int, str]]:
  """Lines and their numbers from 1 on, without empty ones; bytes that are no text stay visible."""
  with path.open(encoding="utf-8", errors="backslashreplace") as file:
    for number, line in enumerate(file, start=1):
      if line.strip():
        yield number, line


def _key(line: str, number: int, means: str) -> str:
  text = f"{number}\n{line.strip()}\n{means}"
  return hashlib.sha256(text.encode("utf-8", "backslashreplace")).hexdigest()[:16]


def _read_answers(output: Path, keys: set[str]) -> set[str]:
  """Keys of the answers that are there; a last line that a kill cut short is removed."""
  if not output.exists():
    output.parent.mkdir(parents=True, exist_ok=True)
    return set()
  text = output.read_text(encoding="utf-8")
  whole = text[: text.rfind("\n") + 1]
  if whole != text:
    write_text(output, whole)
  found = set()
  for number, line in enumerate(whole.split("\n")[:-1], start=1):
    try:
      key = json.loads(line)["key"]
    except (ValueError, KeyError, TypeError) as error:
      raise ValueError(
        f"{output}:{number} is no answer ({error!r}); give another --output, or delete it."
      ) from error
    if key not in keys:
      raise ValueError(
        f"{output}:{number} answers another request, or by another policy or other settings; give "
        "another --output, or delete it."
      )
    found.add(key)
  return found


def _sort(output: Path) -> None:
  lines = output.read_text(encoding="utf-8").split("\n")[:-1]
  lines.sort(key=lambda line: json.loads(line)["line"])
  write_text(output, "".join(line + "\n" for line in lines))
