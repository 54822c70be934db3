"""How much of a user one must know: matched accuracy by the number of acts a policy sees.

The acts of a user are drawn in an order of their own, of which the first so many are shown, in the
order kept: more acts are the fewer ones and others. All numbers are measured on the same pairs.
"""

from collections.abc import Callable, Sequence

import numpy as np
from absl import logging

from alignx_jax.data.records import Example
from alignx_jax.evaluation.accuracy import CONDITIONS, BridgeScorer, Scorer
from alignx_jax.evaluation.changes import changed
from alignx_jax.evaluation.results import EMPTY, interval, markdown, percent
from alignx_jax.personas.persona import HistoryPolicy, Persona

# What acts are called in a condition, "4 pairs", by the kinds that are shown.
KINDS = {"comments": ("ugc",), "pairs": ("pair",), "acts": ("ugc", "pair")}


def acts_of(persona: Persona, kinds: Sequence[str]) -> int:
  """How many acts of these kinds are known."""
  return len(persona.comments) * ("ugc" in kinds) + len(persona.pairs) * ("pair" in kinds)


def matched_ratio(
  policy: "Scorer | BridgeScorer", base: Scorer, history: HistoryPolicy
) -> np.ndarray:
  """log π/π_ref [X, N] where a policy sees so much of each user, in its first condition.

  Args:
    policy: reads text, and is named as in results; or has the P̃ inferred from so much.
  """
  if isinstance(policy, BridgeScorer):
    return policy.score("inferred") - base.score("none")
  condition = CONDITIONS[policy.name][0]
  if condition == "inferred" and history.policy == "fixed" and not history.items:
    return policy.score("none") - base.score("none")  # of no acts there is no P̃ to tell
  key = condition, False, history
  return policy.score(*key) - base.score(*key)


def history_rows(
  name: str,
  policy_of: Callable[[HistoryPolicy], "Scorer | BridgeScorer"],
  base: Scorer,
  examples: Sequence[Example],
  *,
  acts: Sequence[int],
) -> list[dict]:
  """Rows of changes.changed, by the kinds and the number of acts; the change is from none.

  Of each kind those users count who have the largest number of acts; a number that no user has is
  left out, with a warning. "acts" and "kinds" say what was seen. Descriptions are not shown.

  Args:
    policy_of: the policy's scores where it sees so much of each user.
    acts: numbers, to be measured in ascending order.
  """
  ratio = lambda history: matched_ratio(policy_of(history), base, history)
  none_XN = ratio(HistoryPolicy("fixed", 0, ("ugc", "pair")))
  zero = changed(name, "0 acts", "matched", examples, none_XN, none_XN) if 0 in acts else []
  rows = [row | {"acts": 0, "kinds": "acts"} for row in zero]
  for word, kinds in KINDS.items():
    known_X = np.array([acts_of(example.persona, kinds) for example in examples])
    counts = sorted(n for n in set(acts) if 0 < n <= known_X.max())
    if missing := sorted(n for n in set(acts) if n > known_X.max()):
      logging.warning("No user has %s %s: not measured.", ", ".join(map(str, missing)), word)
    for n in counts:
      ratio_XN = ratio(HistoryPolicy("fixed", n, kinds))
      ratio_XN = np.where((known_X >= counts[-1])[:, None], ratio_XN, np.nan)
      for row in changed(name, f"{n} {word}", "matched", examples, none_XN, ratio_XN):
        rows.append(row | {"acts": n, "kinds": word})
  return rows


def by_acts(rows: Sequence[dict], *kinds: str) -> dict[str, dict[int, dict]]:
  """{policy and kind: {number of acts: row}} of some kinds, each with the row of no acts."""
  lines = {}
  for policy in dict.fromkeys(row["policy"] for row in rows):
    for word in kinds:
      found = {
        r["acts"]: r
        for r in rows
        if r["policy"] == policy and (r["kinds"] == word or not r["acts"])
      }
      lines[f"{policy}, {word}"] = found
  return lines


def format_history(rows: Sequence[dict]) -> str:
  """Accuracy with its interval by the number of acts, across, as a Markdown table."""
  if not rows:
    return EMPTY
  counts = sorted({row["acts"] for row in rows})
  cell = lambda r: f"{percent(r)} {interval(r)}" if r else "–"
  lines = [
    (*name.split(", "), *(cell(found.get(n)) for n in counts))
    for name, found in by_acts(rows, *KINDS).items()
  ]
  return markdown(("policy", "of", *map(str, counts)), lines, left=2)
