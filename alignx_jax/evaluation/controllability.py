"""Does a policy do what P̃ says: P̃ reversed, one dimension steered, the history's choices exchanged.

A margin is log π/π_ref of the chosen response less that of the rejected one. A policy that follows
P̃ turns its sign when P̃ is reversed; it goes the more against the user the more strongly one
dimension of the pair is steered against them; and it stays where it was when a dimension is
reversed of which neither response speaks.

What is told in words can only be stated or not: a strength of −1 states the other pole.
"""

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np

from alignx_jax.data.formatting import Formatting, Refused, infer_profile
from alignx_jax.data.records import Example, Profiled
from alignx_jax.evaluation.accuracy import BridgeScorer, Scorer
from alignx_jax.evaluation.changes import changed
from alignx_jax.personas.distribution import DIRECTIONS_K
from alignx_jax.personas.persona import HistoryPolicy
from alignx_jax.personas.preferences import NEUTRAL

# Towards the user's own pole of one dimension of the pair (1: nothing but it), or the other one.
STRENGTHS = (-1.0, -0.75, -0.5, -0.25, 0.0, 0.25, 0.5, 0.75, 1.0)
STATED = (-1.0, 0.0, 1.0)  # of these, what words can tell
PAIRS = HistoryPolicy(kinds=("pair",))


def strength(value: float) -> str:
  """The condition in which one dimension of each pair is steered so strongly."""
  return f"strength {value:+g}"


# ------------------------------------------------------------------ what is changed


def exchanged(examples: Sequence[Example]) -> list[Example]:
  """Examples whose users preferred, in each pair of their history, the other response.

  Labels of these pairs are reversed with them; comments and descriptions stay.
  """

  def exchange(pair):
    directions_P = None if pair.directions is None else 1 - pair.directions
    return dataclasses.replace(
      pair, chosen=pair.rejected, rejected=pair.chosen, directions=directions_P
    )

  return [
    dataclasses.replace(
      example,
      persona=dataclasses.replace(
        example.persona, pairs=tuple(exchange(pair) for pair in example.persona.pairs)
      ),
    )
    for example in examples
  ]


@dataclasses.dataclass(frozen=True)
class Touched:
  """Which dimension of each example is steered, and which way is the user's; −1 where none is.

  Attributes:
    own_X, own_pole_X: one that the pair is of, drawn at random; the label's direction of it, 0
      or 1.
    other_X, other_pole_X: of those that it is not of, the one that P̃ is surest of; the direction
      that P̃ says.
  """

  own_X: np.ndarray
  own_pole_X: np.ndarray
  other_X: np.ndarray
  other_pole_X: np.ndarray


def touched(
  examples: Sequence[Example], formatting: Formatting, says_XP: np.ndarray, *, seed: int = 0
) -> Touched:
  """The dimensions to steer.

  Args:
    formatting: of the policy, whose space has the dimensions.
    says_XP: mean directions by P̃, 0 … 1; NaN where there is no P̃.
  """
  found = np.full((4, len(examples)), -1)
  for i, example in enumerate(examples):
    labels_P = formatting.labels(example.directions)
    if labels_P is None or not np.isfinite(says_XP[i]).all():
      continue
    own = np.flatnonzero((labels_P == 0) | (labels_P == 2))
    other = np.flatnonzero(labels_P == 1)
    if not len(own) or not len(other):
      continue
    one = np.random.default_rng([seed, i]).choice(own)
    sure = other[np.argmax(np.abs(says_XP[i, other] - NEUTRAL))]
    found[:, i] = one, labels_P[one] // 2, sure, says_XP[i, sure] >= NEUTRAL
  return Touched(*found)


def steer(
  preferences_XPK: np.ndarray, dimension_X: np.ndarray, pole_X: np.ndarray, strength: float
) -> np.ndarray:
  """P̃ with one dimension of each example steered, as Preferences.with_preferences does.

  Args:
    dimension_X: NaN is made of the P̃ of those where it is −1.
    pole_X: the direction, 0 or 1, of a strength above 0; of one below, the other.
  """
  steered_XPK, x = preferences_XPK.copy(), np.arange(len(preferences_XPK))
  pole_X = np.where(strength < 0, 1 - pole_X, pole_X)
  one_hot_XK = pole_X[:, None] == DIRECTIONS_K
  s = abs(strength)
  steered_XPK[x, dimension_X] = (1 - s) * steered_XPK[x, dimension_X] + s * one_hot_XK
  steered_XPK[dimension_X < 0] = np.nan
  return steered_XPK


# ------------------------------------------------------------------ measured


def _ratios(policy: Scorer, base: Scorer, examples: Sequence[Example], *key) -> dict:
  """log π/π_ref [X, N] by protocol, where the users of the same pairs are told otherwise."""
  on = lambda scorer: dataclasses.replace(scorer, examples=examples).score(*key)
  score_XN = on(policy)
  return {"matched": score_XN - on(base), "unconditioned": score_XN - base.score("none")}


def history_rows(name: str, condition: str, policy: Scorer, base: Scorer) -> list[dict]:
  """What a policy that reads text makes of a history whose choices are exchanged.

  With all that is known of the user, comments that contradict the choices included; and with the
  pairs alone. Users without any are left out.
  """
  examples = policy.examples
  has_X = np.array([bool(e.persona.pairs) for e in examples])
  rows = []
  for told, history in (("exchanged", HistoryPolicy()), ("pairs exchanged", PAIRS)):
    before, after = (
      _ratios(policy, base, e, condition, False, history) for e in (examples, exchanged(examples))
    )
    for protocol in before:
      before_XN = np.where(has_X[:, None], before[protocol], np.nan)
      rows += changed(name, told, protocol, examples, before_XN, after[protocol])
  return rows


def profile_rows(name: str, policy: Scorer, base: Scorer) -> list[dict]:
  """What a policy that is told P̃ in words makes of others: reversed, steered."""
  space, examples = policy.formatting.space, policy.examples
  inferred_XP = np.full((len(examples), len(space)), np.nan)
  golden_XP = inferred_XP.copy()
  for i, example in enumerate(examples):
    if example.directions is not None:
      golden_XP[i] = example.directions
    try:
      inferred_XP[i] = space.parse(infer_profile(example, example.persona, space))
    except Refused:
      continue  # told and counted where it is scored as it is
  touch = touched(examples, policy.formatting, inferred_XP)

  def steered(dimension_X, pole_X):
    told_XP = inferred_XP.copy()
    told_XP[np.arange(len(examples)), dimension_X] = pole_X
    told_XP[dimension_X < 0] = np.nan
    return told_XP

  own = {
    1.0: steered(touch.own_X, touch.own_pole_X),
    0.0: np.where(touch.own_X[:, None] < 0, np.nan, inferred_XP),
    -1.0: steered(touch.own_X, 1 - touch.own_pole_X),
  }
  others_XP = steered(touch.other_X, 1 - touch.other_pole_X)
  profiles = {
    "reversed": (inferred_XP, 1 - inferred_XP),
    "golden reversed": (golden_XP, 1 - golden_XP),
    **{strength(s): (inferred_XP, own[s]) for s in STATED},
    "another reversed": (inferred_XP, others_XP),
  }
  scores = {}

  def ratios(told_XP):
    key = told_XP.tobytes()
    if key not in scores:
      text = lambda told_P: space.verbalise(told_P) if np.isfinite(told_P).all() else None
      told = Profiled(examples, [text(told_P) for told_P in told_XP])
      scores[key] = _ratios(policy, base, told, "profile")
    return scores[key]

  return [
    row
    for told, (before_XP, after_XP) in profiles.items()
    for protocol, before_XN in ratios(before_XP).items()
    for row in changed(name, told, protocol, examples, before_XN, ratios(after_XP)[protocol])
  ]


def bridge_rows(
  name: str,
  policy: BridgeScorer,
  base: Scorer,
  infer: Callable[[Sequence[Example], HistoryPolicy], np.ndarray],
) -> list[dict]:
  """What a policy makes of P̃ that is told it as tokens: reversed, steered, of another history.

  Args:
    infer: P̃ [X, P, K] of other examples of which so much is shown, as the bridge infers it.
  """
  examples, inferred_XPK = policy.examples, policy.inferred_XPK
  told = lambda preferences_XPK: dataclasses.replace(policy, inferred_XPK=preferences_XPK)
  reference_XN = base.score("none")
  before_XN = policy.score("inferred") - reference_XN
  ratio = lambda preferences_XPK: told(preferences_XPK).score("inferred") - reference_XN
  row = lambda condition, before, after: changed(
    name, condition, "matched", examples, before, after
  )
  golden_XPK = policy.preferences("golden")
  rows = row("reversed", before_XN, ratio(inferred_XPK[..., ::-1]))
  rows += row("golden reversed", *map(ratio, (golden_XPK, golden_XPK[..., ::-1])))
  touch = touched(examples, policy.formatting, inferred_XPK @ DIRECTIONS_K)
  for s in STRENGTHS:
    steered_XPK = steer(inferred_XPK, touch.own_X, touch.own_pole_X, s)
    rows += row(strength(s), before_XN, ratio(steered_XPK))
  other_XPK = steer(inferred_XPK, touch.other_X, touch.other_pole_X, -1.0)
  rows += row("another reversed", before_XN, ratio(other_XPK))
  turned = exchanged(examples)
  rows += row("exchanged", before_XN, ratio(infer(turned, HistoryPolicy())))
  has_X = np.array([bool(e.persona.pairs) for e in examples])
  pairs = [np.where(has_X[:, None, None], infer(e, PAIRS), np.nan) for e in (examples, turned)]
  return rows + row("pairs exchanged", *map(ratio, pairs))
