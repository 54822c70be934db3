"""Benchmarks by name: a prepared set, or the published files as they are."""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

from alignx_jax.data.prepared import is_prepared, open_prepared
from alignx_jax.data.records import COMMENTS, DESCRIPTION, PAIRS, Example
from alignx_jax.personas.preferences import PreferenceSpace

# The persona field that a benchmark is of, where it is one alone (AlignX, Table 3).
KINDS = {
  "test_ugc": COMMENTS,
  "test_pair": PAIRS,
  "test_demo": DESCRIPTION,
  "p_soups": PAIRS,
  "prism": PAIRS,
  "uf_p_4": PAIRS,
}
_ENDINGS = (".json", ".parquet")


@dataclasses.dataclass(frozen=True)
class Unusable:
  """A record that is not scored: where it is, the field, what is wrong and what to do."""

  where: str
  field: str
  reason: str


@dataclasses.dataclass(frozen=True, eq=False)
class Benchmark:
  """The test records of a benchmark.

  Attributes:
    space: of their directions.
    unusable: what is no Example, record by record.
    files: where they come from, a prepared directory or files.
  """

  name: str
  space: PreferenceSpace
  examples: tuple[Example, ...]
  unusable: tuple[Unusable, ...]
  files: tuple[str, ...]


def load_benchmark(name: str, directory: str | Path) -> Benchmark:
  """Reads a benchmark.

  Args:
    name: of a set in data/alignx.py that has a test split.
    directory: holds NAME/, as prepare_data.py wrote it or with published files in it, or
      NAME.json or NAME.parquet. Capitals and hyphens, as in P-Soups/, make no difference.
  Raises:
    ValueError: no benchmark has this name.
    FileNotFoundError: the directory has none of these; says what was looked for.
  """
  from alignx_jax.data.alignx import CONFIGS

  configs = {config.name: config for config in CONFIGS if "test" in config.splits}
  if name not in configs:
    raise ValueError(f"No benchmark {name!r}; set --benchmarks to some of {', '.join(configs)}.")
  found = _find(name, Path(directory))
  if is_prepared(str(found[0])):
    examples, unusable = list(open_prepared(str(found[0]))["test"]), _quarantined(found[0])
  else:
    examples, unusable = _read(found, configs[name])
  usable = []
  for example in examples:
    if _has(example, field := KINDS.get(name)):
      usable.append(example)
    else:
      reason = f"is missing or empty, and {name} is of users by it; add it."
      unusable.append(Unusable(example.id, field, reason))
  return Benchmark(
    name, configs[name].space, tuple(usable), tuple(unusable), tuple(map(str, found))
  )


def _find(name: str, directory: Path) -> list[Path]:
  """A prepared directory alone, or published files in the order of their names."""
  if not directory.is_dir():
    raise FileNotFoundError(
      f"{directory} is no directory; set --benchmark_data to the one that holds {name}/."
    )
  plain = lambda path: path.name.lower().replace("-", "_")
  for path in sorted(directory.iterdir()):
    if path.is_dir() and plain(path) == name:
      files = sorted(file for file in path.iterdir() if file.suffix in _ENDINGS)
      if is_prepared(str(path)):
        return [path]
      if files:
        return files
    elif path.is_file() and plain(path) in [name + ending for ending in _ENDINGS]:
      return [path]
  raise FileNotFoundError(
    f"{directory} has no {name}.json, {name}.parquet, nor {name}/ with such files or with what "
    "prepare_data wrote; put the published files there, or set --benchmark_data."
  )


def _read(files: Sequence[Path], config) -> tuple[list[Example], list[Unusable]]:
  from alignx_jax.data.alignx import read_records
  from alignx_jax.data.sources import Refusal, find_parts

  examples, refusals = [], []
  for file in files:
    parts, damaged = find_parts(str(file), rows=8192)
    for item in (*damaged, *(item for part in parts for item in read_records(part, config))):
      if isinstance(item, Refusal):
        refusals.append(_unusable(Path(item.file).name, vars(item)))
      else:
        examples.append(item.example)
  return examples, refusals


def _quarantined(directory: Path) -> list[Unusable]:
  """What was refused when a set was prepared."""
  path = directory / "quarantine.jsonl"
  lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
  refusals = [json.loads(line) for line in lines]
  return [_unusable(Path(item["file"]).name, item) for item in refusals]


def _unusable(file: str, refusal: dict) -> Unusable:
  rows = refusal.get("rows", 1)
  where = f"{file}:{refusal['row']}" + (f" to {refusal['row'] + rows - 1}" if rows > 1 else "")
  return Unusable(where, refusal["field"], refusal["reason"])


def _has(example: Example, field: str | None) -> bool:
  persona = example.persona
  kinds = {COMMENTS: persona.comments, PAIRS: persona.pairs, DESCRIPTION: persona.description}
  return field is None or bool(kinds[field])
