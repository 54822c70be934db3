"""The published record schema: validation, and the Example the rest of the code uses."""

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from alignx_jax.personas.persona import ComparedPair, Persona, UserComment
from alignx_jax.personas.preferences import PreferenceSpace

COMMENTS = "User-Generated Content"
PAIRS = "Pair-wise Comparative Feedback"
DESCRIPTION = "Demographic Information"
DIRECTIONS = "Preference Direction"


class RecordError(ValueError):
  """A record that breaks the schema. `field` and `reason` are for tables."""

  def __init__(self, where: str, field: str, reason: str):
    super().__init__(f"{where}: field {field!r} {reason}" if field else f"{where}: {reason}")
    self.where, self.field, self.reason = where, field, reason

  def __reduce__(self):  # errors of workers come pickled
    return RecordError, (self.where, self.field, self.reason)


@dataclasses.dataclass(frozen=True)
class Example:
  """One validated record.

  Attributes:
    id: where it comes from, "file:index"; safe to log.
    directions: preference directions [P] on this pair, None where unknown.
    profile: a precomputed profile text P̃, None where there is none.
  """

  id: str
  post: str
  chosen: str
  rejected: str
  persona: Persona
  directions: np.ndarray | None = None
  profile: str | None = None


@dataclasses.dataclass(frozen=True)
class Profiled(Sequence):
  """Examples with other profiles, P̃ as text: one for each; None where there is none."""

  examples: Sequence[Example]
  profiles: Sequence[str | None]

  def __len__(self) -> int:
    return len(self.examples)

  def __getitem__(self, index):
    if isinstance(index, slice):
      return Profiled(self.examples[index], self.profiles[index])
    return dataclasses.replace(self.examples[index], profile=self.profiles[index])

  @property
  def fingerprint(self) -> str:
    """Stands for what these examples say, where the examples themselves have such."""
    profiles = hashlib.sha256(json.dumps(list(self.profiles)).encode()).hexdigest()
    return f"{self.examples.fingerprint} {profiles}"


def parse_record(record: dict, space: PreferenceSpace, where: str) -> Example:
  """Validates one record in the published schema.

  Args:
    record: a mapping as in the published JSON; persona fields may be absent or null.
    where: names the record in errors, "file:index"; becomes the Example's id.
  Raises:
    RecordError: names `where`, the field, what is wrong and what to do.
  """
  if not isinstance(record, dict):
    raise RecordError(where, "", f"the record is a {type(record).__name__}; make it an object.")

  def text(source, field, path="", allow_empty=False):
    name = path + field
    if field not in source:
      raise RecordError(where, name, "is missing; add it.")
    value = source[field]
    if not isinstance(value, str):
      raise RecordError(where, name, f"is a {type(value).__name__}; make it a string.")
    try:
      value.encode("utf-8")
    except UnicodeEncodeError as error:
      raise RecordError(where, name, f"is not valid Unicode ({error.reason}); mend it.") from None
    if not allow_empty and not value.strip():
      raise RecordError(where, name, "is empty; drop the record or fill it in.")
    return value

  def directions(source, path=""):
    name = path + DIRECTIONS
    value = source.get(DIRECTIONS)
    if value is None:
      return None
    if not isinstance(value, Sequence | np.ndarray) or isinstance(value, str):
      raise RecordError(where, name, f"is a {type(value).__name__}; make it a list of numbers.")
    if len(value) != len(space):
      raise RecordError(
        where,
        name,
        f"has {len(value)} values; the preference space {space.name!r} has {len(space)}: set "
        "config.data.space to the space that the records were labelled in.",
      )
    for i, x in enumerate(value):
      if isinstance(x, bool) or not isinstance(x, int | float | np.number) or x not in (0, 0.5, 1):
        # What may be somebody's words is not repeated.
        found = f"a {type(x).__name__}" if isinstance(x, str | list | dict) else repr(x)
        raise RecordError(where, name, f"has {found} at index {i}; use 0, 0.5 or 1.")
    return np.asarray(value, np.float32)

  def items(field):
    value = record.get(field)
    if value is None:
      return []
    if not isinstance(value, Sequence | np.ndarray) or isinstance(value, str):
      raise RecordError(where, field, f"is a {type(value).__name__}; make it a list.")
    for i, item in enumerate(value):
      if not isinstance(item, dict):
        name = f"{field}[{i}]"
        raise RecordError(where, name, f"is a {type(item).__name__}; make it an object.")
    return [(f"{field}[{i}].", item) for i, item in enumerate(value)]

  persona = Persona(
    comments=tuple(
      UserComment(text(item, "prompt", path), text(item, "comment", path), directions(item, path))
      for path, item in items(COMMENTS)
    ),
    pairs=tuple(
      ComparedPair(
        text(item, "prompt", path),
        text(item, "chosen", path),
        text(item, "rejected", path),
        directions(item, path),
      )
      for path, item in items(PAIRS)
    ),
    description=(
      text(record, DESCRIPTION, allow_empty=True) if record.get(DESCRIPTION) is not None else ""
    ),
  )
  return Example(
    id=where,
    post=text(record, "prompt"),
    chosen=text(record, "chosen"),
    rejected=text(record, "rejected"),
    persona=persona,
    directions=directions(record),
    profile=text(record, "profile") if record.get("profile") is not None else None,
  )


def read_records(path: str | Path) -> list[dict]:
  """Reads a JSON list of records.

  Raises:
    FileNotFoundError, ValueError: name the file and what to do.
  """
  path = Path(path)
  if not path.is_file():
    raise FileNotFoundError(f"{path} is no file; set config.data.path to a JSON list.")
  try:
    records = json.loads(path.read_text(encoding="utf-8-sig"))
  except (ValueError, RecursionError) as error:
    raise ValueError(f"{path} is not whole JSON ({error}); fetch it again.") from error
  if not isinstance(records, list):
    raise ValueError(f"{path} holds a {type(records).__name__}; it must be a list of records.")
  return records


def read_examples(path: str | Path, space: PreferenceSpace) -> list[Example]:
  """Reads and validates a JSON list of records; raises at the first bad one."""
  name = Path(path).name
  return [parse_record(r, space, f"{name}:{i}") for i, r in enumerate(read_records(path))]
