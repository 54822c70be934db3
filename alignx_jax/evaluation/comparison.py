"""Two evaluations' figures, pair by pair: which rows go together, and the table of what differs."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from alignx_jax.evaluation.record_table import ROW, read_table, row_groups
from alignx_jax.evaluation.significance import compare_pairs
from alignx_jax.files import as_path

Choice = tuple[str, str] | None  # of the first and of the second; None: whatever both have
Rows = list[tuple[dict, dict[str, np.ndarray]]]
HEADS = ("benchmark", "first", "second", "first %", "second %", "difference [95 % by user]")
HEADS += ("[by post]", "only first : second right", "p", "pairs", "left out")


def read_rows(path: str | Path) -> Rows:
  """Every figure of an evaluation with its pairs, see record_table.row_groups.

  Args:
    path: the workdir of an evaluation on benchmarks, or one of its parquet files.
  Raises:
    FileNotFoundError, ValueError: there is none; says what to run.
  """
  path = as_path(path)
  files = [path] if path.suffix == ".parquet" else sorted(path.glob("benchmarks/*.parquet"))
  if not files:
    raise FileNotFoundError(
      f"{path} has no benchmarks/*.parquet; run python -m alignx_jax.evaluate with "
      f"--workdir={path} and --benchmarks first."
    )
  return [row for file in files for row in row_groups(read_table(file)[0])]


def compare_rows(first: Rows, second: Rows, **choices: Choice) -> list[dict]:
  """Compares the figures that go together: those that are the same in all that no choice is of.

  Args:
    choices: by names of ROW.
  Returns:
    What compare_pairs gives, with the labels of both as "labels".
  Raises:
    ValueError: no two figures go together; says which there are.
  """
  chosen = {name: choice for name, choice in choices.items() if choice is not None}

  def fits(labels, which):
    return all(labels[name] == choice[which] for name, choice in chosen.items())

  found = []
  for labels, columns in first:
    for others, other_columns in second:
      alike = all(labels[name] == others[name] for name in ROW if name not in chosen)
      if alike and fits(labels, 0) and fits(others, 1):
        found.append({"labels": (labels, others), **compare_pairs(columns, other_columns)})
  if not found:
    raise ValueError(
      f"No two figures go together. The first has: {_listed(first)}. The second has: "
      f"{_listed(second)}. Choose with --policy, --condition, --protocol and --benchmark: one "
      "value for both, or FIRST,SECOND."
    )
  return found


def _listed(rows: Rows) -> str:
  return "; ".join(" ".join(labels[name] for name in ROW) for labels, _ in rows)


def format_comparisons(comparisons: Sequence[dict]) -> str:
  """The comparisons as a Markdown table, and what to bear in mind."""
  rows = [HEADS, *(_cells(one) for one in comparisons)]
  widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
  line = lambda cells: "| " + " | ".join(c.ljust(w) for c, w in zip(cells, widths, strict=True))
  lines = [f"{line(cells)} |" for cells in (rows[0], ["-" * w for w in widths], *rows[1:])]
  return "\n".join(
    [
      *lines,
      "",
      "Difference: second − first, in points, on the pairs that both have scored. p: McNemar's "
      f"test, two-sided, of each row alone ({len(comparisons)} here); it takes pairs to be "
      "independent. Where a user or a post has many, go by the intervals.",
    ]
  )


def _cells(one: dict) -> tuple[str, ...]:
  labels, others = one["labels"]
  own, other = (" ".join(x[name] for name in ROW if name != "benchmark") for x in (labels, others))
  benchmark = labels["benchmark"]
  if others["benchmark"] != benchmark:
    benchmark += f" : {others['benchmark']}"
  out = ", ".join(
    f"{one[name]} {words}"
    for name, words in (
      ("only_in_first", "only in first"),
      ("only_in_second", "only in second"),
      ("unscored", "not scored"),
    )
    if one[name]
  )
  figures = ("–",) * 6
  if one["pairs"]:
    percent = lambda share: f"{100 * share:.1f}"
    signed = lambda share: f"{100 * share:+.1f}"
    interval = lambda ends: f"[{signed(ends[0])}, {signed(ends[1])}]"
    figures = (
      percent(one["first"]),
      percent(one["second"]),
      f"{signed(one['difference'])} {interval(one['by_user'])}",
      interval(one["by_post"]),
      f"{one['first_only']} : {one['second_only']}",
      f"{one['p']:.2g}",
    )
  return benchmark, own, other, *figures, str(one["pairs"]), out or "none"
