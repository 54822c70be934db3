"""What came of a sweep's trials: a table in parquet, means and intervals over seeds."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from alignx_jax.sweeps.plan import Planned
from alignx_jax.sweeps.running import outcome_of
from alignx_jax.sweeps.space import plain

SEED = "seed"
# Of an outcome, in the order of the table.
_NUMBERS = ("accuracy", "low", "high", "pairs", "shuffled", "validation_accuracy", "steps")


class Row(NamedTuple):
  """A trial and what came of it: an outcome as trial.run_trial gives, or "not run"."""

  trial: Planned
  outcome: dict

  @property
  def finished(self) -> bool:
    return self.outcome["status"] == "finished"


class Mean(NamedTuple):
  """A mean accuracy over seeds, its 95 % interval and how many seeds.

  Attributes:
    low, high: Student's t over the seeds; of a single trial, over its test pairs; NaN where
      neither is to be had.
  """

  mean: float
  low: float
  high: float
  seeds: int


def read_rows(plan: Sequence[Planned]) -> list[Row]:
  return [Row(trial, outcome_of(trial) or {"status": "not run"}) for trial in plan]


def write_table(path: Path, rows: Sequence[Row]) -> None:
  """One row a trial: name, status, overrides by field, factors, numbers, and all results."""
  import pyarrow as pa
  import pyarrow.parquet as pq

  columns = {
    "name": [row.trial.name for row in rows],
    "status": [row.outcome["status"] for row in rows],
    "reason": [row.outcome.get("reason") for row in rows],
  }
  for prefix, values in (
    ("", [row.trial.overrides for row in rows]),
    ("factor.", [row.trial.factors for row in rows]),
  ):
    for field in dict.fromkeys(field for one in values for field in one):
      if prefix and all(
        row.trial.overrides.get(field) == row.trial.factors.get(field) for row in rows
      ):
        continue
      columns[prefix + field] = _one_type([one.get(field) for one in values])
  for name in _NUMBERS:
    columns[name] = [_number(row.outcome.get(name)) for row in rows]
  for name in ("seconds", "attempts", "version"):
    columns[name] = [row.outcome.get(name) for row in rows]
  columns["results"] = [json.dumps(row.outcome.get("results", [])) for row in rows]
  path.parent.mkdir(parents=True, exist_ok=True)
  partial = path.with_name(f".{path.name}.tmp")
  pq.write_table(pa.table(columns), partial)
  partial.replace(path)


def _one_type(values: list) -> list:
  """Values of one column: as they are where all are numbers or all text, else as text."""
  known = [value for value in values if value is not None]
  if len({type(value) for value in known}) == 1 and isinstance(known[0], (bool, int, float, str)):
    return values
  if all(isinstance(value, (int, float)) and not isinstance(value, bool) for value in known):
    return [None if value is None else float(value) for value in values]
  return [None if value is None else plain(value) for value in values]


def _number(value):
  return None if value is None or math.isnan(value) else float(value)


# ------------------------------------------------------------------ over seeds


def setting(row: Row) -> Mapping[str, Any]:
  """The factors of a trial but its seed."""
  return {name: value for name, value in row.trial.factors.items() if name != SEED}


def settings(rows: Sequence[Row]) -> dict[str, list[Row]]:
  """Trials that differ in their seeds alone, by what they have in common as text."""
  groups = {}
  for row in rows:
    label = ", ".join(f"{name} {plain(value)}" for name, value in setting(row).items())
    groups.setdefault(label or "as the config", []).append(row)
  return groups


def mean_of(rows: Sequence[Row], number: str = "accuracy") -> Mean | None:
  """Mean over seeds, of what of a setting has finished; None if nothing has."""
  finished = [row for row in rows if row.finished]
  if len(finished) == 1 and number == "accuracy":
    outcome = finished[0].outcome
    return Mean(outcome["accuracy"], outcome["low"], outcome["high"], 1)
  return _interval([row.outcome[number] for row in finished])


def effects(rows: Sequence[Row], factor: str) -> dict[Any, tuple[Mean, list[float]]]:
  """For each value of a factor the mean accuracy, and that of each trial.

  The mean of a seed is that of its trials with the value, over all other factors; the interval is
  over seeds.
  """
  found = {}
  for value in values_of(rows, factor):
    by_seed = {}
    for row in rows:
      if row.finished and row.trial.factors.get(factor) == value:
        by_seed.setdefault(row.trial.factors.get(SEED), []).append(row.outcome["accuracy"])
    if by_seed:
      means = [sum(each) / len(each) for each in by_seed.values()]
      found[value] = _interval(means), [x for each in by_seed.values() for x in each]
  return found


def varied(rows: Sequence[Row]) -> list[str]:
  """Factors other than the seed that differ between trials."""
  names = dict.fromkeys(name for row in rows for name in setting(row))
  return [name for name in names if len(values_of(rows, name)) > 1]


def values_of(rows: Sequence[Row], factor: str) -> list:
  """The values of a factor: numbers by size, others as they first come."""
  values = []
  for row in rows:
    value = row.trial.factors.get(factor)
    if value not in values:
      values.append(value)
  return sorted(values) if are_numbers(values) else values


def are_numbers(values: Sequence) -> bool:
  return all(isinstance(x, (int, float)) and not isinstance(x, bool) for x in values)


def _interval(values: Sequence[float]) -> Mean | None:
  count = len(values)
  if not count:
    return None
  mean = sum(values) / count
  if count == 1:
    return Mean(mean, math.nan, math.nan, 1)
  from scipy.special import stdtrit

  deviation = math.sqrt(sum((x - mean) ** 2 for x in values) / (count - 1))
  reach = float(stdtrit(count - 1, 0.975)) * deviation / math.sqrt(count)
  return Mean(mean, max(0.0, mean - reach), min(1.0, mean + reach), count)


# ------------------------------------------------------------------ as text


HEADINGS = ("setting", "accuracy % [95 % CI]", "shuffled %", "seeds")


def text_rows(rows: Sequence[Row]) -> list[tuple[str, str, str, str]]:
  """A line of cells for each setting, the best first; those without a result last."""
  lines = []
  for label, group in settings(rows).items():
    mean, floor = mean_of(group), mean_of(group, "shuffled")
    status = [row.outcome["status"] for row in group if not row.finished]
    note = ", ".join(f"{status.count(kind)} {kind}" for kind in dict.fromkeys(status))
    shuffled = percent(floor.mean) if floor else "–"
    seeds = f"{mean.seeds if mean else 0}{f' ({note})' if note else ''}"
    cells = label, in_percent(mean), shuffled, seeds
    lines.append((-mean.mean if mean else math.inf, cells))
  return [cells for _, cells in sorted(lines, key=lambda line: line[0])]


def in_percent(mean: Mean | None) -> str:
  if mean is None:
    return "–"
  if math.isnan(mean.low):
    return percent(mean.mean)
  return f"{percent(mean.mean)} [{percent(mean.low)}, {percent(mean.high)}]"


def percent(share: float) -> str:
  return "–" if math.isnan(share) else f"{100 * share:.1f}"


def as_text(rows: Sequence[Row]) -> str:
  """The table that a sweep prints, and why trials failed."""
  lines = [HEADINGS, *text_rows(rows)]
  widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
  rule = ("-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:]))
  lines.insert(1, rule)
  fit = lambda cells: " | ".join(
    cell.rjust(width) if i else cell.ljust(width)
    for i, (cell, width) in enumerate(zip(cells, widths, strict=True))
  )
  text = "\n".join(f"| {fit(cells)} |" for cells in lines)
  for row in failures(rows):
    text += f"\n{row.trial.name} failed: {row.outcome['reason']} (see {row.trial.workdir})"
  return text


def failures(rows: Sequence[Row]) -> list[Row]:
  return [row for row in rows if row.outcome["status"] in ("failed", "interrupted")]
