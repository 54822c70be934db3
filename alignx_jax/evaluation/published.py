"""Benchmark results beside what AlignX published: as text."""

import functools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from alignx_jax.evaluation.results import format_table


@functools.cache
def _published() -> dict:
  return json.loads(Path(__file__).with_name("published.json").read_text(encoding="utf-8"))


def source() -> str:
  """Where the published figures are from, and of which models."""
  return f"published: {_published()['of']}; {_published()['source']}"


def published_accuracy(row: Mapping) -> float | None:
  """The published alignment accuracy in % beside a result, None where there is none.

  A learned bridge has none: what was published is P̃ as text.

  Args:
    row: has "benchmark", "policy", "condition" and "protocol".
  """
  keys = ("policy", "condition", "protocol")
  for known in _published()["rows"]:
    if all(known[key] == row[key] for key in keys):
      return known["accuracy"].get(row["benchmark"])
  return None


def by_benchmark(results: Sequence[Mapping]) -> dict[str, list[dict]]:
  """The results of each benchmark with what was "published" beside them, as text."""
  groups: dict[str, list[dict]] = {}
  for row in results:
    figure = published_accuracy(row)
    text = "–" if figure is None else f"{figure:.2f}"
    groups.setdefault(row["benchmark"], []).append(dict(row) | {"published": text})
  return groups


def column() -> dict[str, str]:
  """The column of published figures: key in a row and heading."""
  return {"published": f"published % ({_published()['of']})"}


def format_benchmarks(results: Sequence[Mapping]) -> str:
  """A table for each benchmark, and where the published figures are from."""
  parts = []
  for name, rows in by_benchmark(results).items():
    parts += [name, "", format_table(rows, extra=column()), ""]
  return "\n".join([*parts, source()])
