"""How often one set of responses is preferred to another, with its interval and its controls.

Every pair is judged in both orders. A judge that changes its mind with the order has none: that is
a tie, and counted as `disagree`, the judge's bias for a position. Ties count half. A pair without
two verdicts counts nowhere but in `not_judged`.
"""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from alignx_jax.evaluation.accuracy import bootstrap_interval
from alignx_jax.evaluation.answers import Pair
from alignx_jax.evaluation.judges.questions import Judge, Verdict
from alignx_jax.evaluation.length_control import LengthControl, length_controlled
from alignx_jax.files import write_text

SAME = Verdict(0.5, facts={"same": True})  # of two equal responses, which nobody is asked


class Judged(NamedTuple):
  """A pair with its verdicts.

  Attributes:
    forward, backward: with the first response as A, and as B.
    outcome: of the first response: 1 a win, 0.5 a tie, 0 a loss; None where it was not judged.
    is_disagreement: whether the two orders differ.
  """

  pair: Pair
  forward: Verdict
  backward: Verdict
  outcome: float | None
  is_disagreement: bool = False

  @property
  def failure(self) -> str:
    """Why it was not judged."""
    return self.forward.failure or self.backward.failure


def judge_pairs(judge: Judge, pairs: Sequence[Pair]) -> list[Judged]:
  """Every pair's verdicts, in both orders."""
  questions = []
  for pair in pairs:
    if pair.first.response != pair.second.response:
      forward = pair.question
      questions += [forward, forward._replace(a=forward.b, b=forward.a)]
  bar = tqdm(judge(questions), total=len(questions), desc="judging", unit="verdict", mininterval=1)
  verdicts = list(bar)
  if len(verdicts) != len(questions):
    raise ValueError(
      f"The judge gave {len(verdicts)} verdicts on {len(questions)} questions; each needs one."
    )
  rest = iter(verdicts)
  judged = []
  for pair in pairs:
    same = pair.first.response == pair.second.response
    judged.append(_settle(pair, *((SAME, SAME) if same else (next(rest), next(rest)))))
  return judged


def _settle(pair: Pair, forward: Verdict, backward: Verdict) -> Judged:
  forward, backward = _checked(forward), _checked(backward)
  if forward.preference is None or backward.preference is None:
    return Judged(pair, forward, backward, None)
  ahead, behind = np.sign(forward.preference - 0.5), np.sign(0.5 - backward.preference)
  if ahead != behind:
    return Judged(pair, forward, backward, 0.5, True)
  return Judged(pair, forward, backward, float(ahead / 2 + 0.5))


def _checked(verdict: Verdict) -> Verdict:
  """The verdict; a failure where its preference is none."""
  if verdict.preference is None:
    return verdict._replace(failure=verdict.failure or "the judge gives no reason")
  if not 0 <= verdict.preference <= 1:  # NaN neither
    return Verdict(None, f"the judge's preference is {verdict.preference}, not from 0 to 1")
  return verdict


@dataclasses.dataclass(frozen=True)
class WinRate:
  """The first responses against the second; shares, 0 to 1.

  Attributes:
    low, high: 95 % bootstrap interval over users.
    wins, ties, losses: of the first; `disagree` of the ties are such by the order alone, `same` by
      the responses' being equal.
    first_shown: share of verdicts for the response shown first, ties half; 0.5 without bias.
    cut: answers among the pairs that ended at the most tokens.
  """

  win_rate: float
  low: float
  high: float
  length_control: LengthControl
  wins: int
  ties: int
  losses: int
  disagree: int
  same: int
  first_shown: float | None
  pairs: int
  users: int
  not_judged: int
  cut: int


def win_rate(judged: Sequence[Judged]) -> WinRate:
  """Sums up.

  Raises:
    ValueError: there is no pair with a verdict.
  """
  scored = [one for one in judged if one.outcome is not None]
  if not scored:
    reason = f" The first failed so: {judged[0].failure}." if judged else ""
    raise ValueError(f"Of {len(judged)} pairs none has a verdict.{reason}")
  outcome_X = np.array([one.outcome for one in scored])
  users = [one.pair.user for one in scored]
  difference_X = np.array(
    [len(o.pair.first.response) - len(o.pair.second.response) for o in scored]
  )
  asked = [v for o in scored for v in (o.forward, o.backward) if v is not SAME]
  return WinRate(
    float(outcome_X.mean()),
    *bootstrap_interval(outcome_X, users),
    length_controlled(outcome_X, difference_X, users),
    wins=int((outcome_X == 1).sum()),
    ties=int((outcome_X == 0.5).sum()),
    losses=int((outcome_X == 0).sum()),
    disagree=sum(one.is_disagreement for one in scored),
    same=sum(one.forward is SAME for one in scored),
    first_shown=(
      float(np.mean([np.sign(v.preference - 0.5) / 2 + 0.5 for v in asked])) if asked else None
    ),
    pairs=len(scored),
    users=len(set(users)),
    not_judged=len(judged) - len(scored),
    cut=sum(not a.is_ended for one in scored for a in (one.pair.first, one.pair.second)),
  )


def format_win_rate(found: WinRate, judge: str) -> str:
  """A small Markdown table."""
  control = found.length_control
  cells = {
    "judge": judge,
    "win rate % [95 % CI]": _percent(found.win_rate, found.low, found.high),
    "at equal length": (
      "–" if control.win_rate is None else _percent(control.win_rate, control.low, control.high)
    ),
    "wins": str(found.wins),
    "ties": str(found.ties),
    "losses": str(found.losses),
    "orders disagree": str(found.disagree),
    "users": str(found.users),
  }
  widths = {name: max(len(name), len(cell)) for name, cell in cells.items()}
  line = lambda row: "| " + " | ".join(row) + " |"
  pad = lambda text, name: text.ljust(widths[name]) if name == "judge" else text.rjust(widths[name])
  rule = ["-" * w if n == "judge" else "-" * (w - 1) + ":" for n, w in widths.items()]
  head = line([pad(name, name) for name in cells])
  body = line([pad(cell, name) for name, cell in cells.items()])
  return "\n".join([head, line(rule), body])


def _percent(share: float, low: float, high: float) -> str:
  return f"{100 * share:.1f} [{100 * low:.1f}, {100 * high:.1f}]"


def write_win_rate(
  path: Path, found: WinRate | None, judged: Sequence[Judged], not_paired: Sequence, **more
) -> None:
  """Writes all of it as JSON, with a record for each pair; responses are named, not quoted.

  Args:
    found: None where there is no verdict.
    not_paired: errors of records that are in no pair.
    more: what else is to be said.
  """
  content: dict[str, Any] = dict(more)
  if found is not None:
    content |= dataclasses.asdict(found) | {"length_control": found.length_control._asdict()}
  content["not_paired"] = [
    {"where": error.where, "field": error.field, "reason": error.reason} for error in not_paired
  ]
  content["records"] = [
    {
      "first": one.pair.first.where,
      "second": one.pair.second.where,
      "request": one.pair.first.request,
      "id": one.pair.first.id,
      "user": one.pair.user,
      "characters": [len(one.pair.first.response), len(one.pair.second.response)],
      "outcome": one.outcome,
      "orders_disagree": one.is_disagreement,
      "failure": one.failure,
      "verdicts": [
        {"shown_first": shown, "preference_for_a": v.preference, "failure": v.failure, **v.facts}
        for shown, v in (("first", one.forward), ("second", one.backward))
      ],
    }
    for one in judged
  ]
  write_text(path, json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False) + "\n")
