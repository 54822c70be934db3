"""What another condition changes on the same pairs: accuracy, and the signs of margins."""

from collections.abc import Sequence

import numpy as np
from absl import logging

from alignx_jax.data.records import Example
from alignx_jax.evaluation.accuracy import bootstrap_interval, result
from alignx_jax.evaluation.results import EMPTY, interval, markdown, percent

COLUMNS = (
  *("policy", "changed", "protocol", "accuracy % [95 % CI]", "change [95 % CI]"),
  *("flips % [95 % CI]", "pairs"),
)


def changed(
  policy: str,
  condition: str,
  protocol: str,
  examples: Sequence[Example],
  before_XN: np.ndarray,
  after_XN: np.ndarray,
) -> list[dict]:
  """One row: accuracy after a change of the condition, and what the change did; or none.

  Beside the keys of results.py: "flips", the share of pairs whose margin changed its sign (to or
  from 0 is no change), "change", accuracy less that before, on the same pairs, each with its
  95 % interval "…_low" to "…_high", and the mean margins "margin_before" and "margin", in nats.

  Args:
    before_XN, after_XN: log π/π_ref, NaN where a pair could not be scored: it is left out.
  """
  before_X, after_X = (ratio[:, 0] - ratio[:, 1] for ratio in (before_XN, after_XN))
  scored_X = np.isfinite(before_X) & np.isfinite(after_X)
  if not scored_X.any():
    logging.warning("%s, %s: no pair could be scored, so there is no such row.", policy, condition)
    return []
  row = result(policy, condition, protocol, examples, np.where(scored_X, after_X > 0, np.nan))
  posts = [examples[i].post for i in np.flatnonzero(scored_X)]
  before_X, after_X = before_X[scored_X], after_X[scored_X]
  figures = {
    "flips": (np.sign(before_X) * np.sign(after_X) < 0).astype(float),
    "change": (after_X > 0).astype(float) - (before_X > 0),
  }
  for name, value_X in figures.items():
    low, high = bootstrap_interval(value_X, posts)
    row |= {name: float(value_X.mean()), f"{name}_low": low, f"{name}_high": high}
  return [row | {"margin_before": float(before_X.mean()), "margin": float(after_X.mean())}]


def format_changes(rows: Sequence[dict]) -> str:
  """Rows of `changed`, and no others, as a Markdown table."""
  if not rows:
    return EMPTY
  points = lambda r: f"{100 * r['change']:+.1f} [{100 * r['change_low']:+.1f}, "
  flips = lambda r: {"low": r["flips_low"], "high": r["flips_high"]}
  cells = [
    (
      *(r[key] for key in ("policy", "condition", "protocol")),
      f"{percent(r)} {interval(r)}",
      f"{points(r)}{100 * r['change_high']:+.1f}]",
      f"{100 * r['flips']:.1f} {interval(flips(r))}",
      r["examples"],
    )
    for r in rows
  ]
  return markdown(COLUMNS, cells, left=3)
