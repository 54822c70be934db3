"""Flips and doses of policies that follow P̃ exactly or not at all, worked out by hand."""

import dataclasses

import numpy as np
import pytest

from alignx_jax.data.formatting import Formatting, Refused, infer_profile
from alignx_jax.data.records import Example
from alignx_jax.data.rows import Regions
from alignx_jax.data.tokenizers import load_tokenizer
from alignx_jax.evaluation import controllability as control
from alignx_jax.evaluation.accuracy import BridgeScorer, Scorer
from alignx_jax.evaluation.changes import changed, format_changes
from alignx_jax.personas.distribution import Preferences
from alignx_jax.personas.persona import (
  ComparedPair,
  HistoryPolicy,
  Persona,
  UserComment,
  sample_history,
)
from alignx_jax.personas.preferences import alignx_space

SPACE = alignx_space()
FORMATTING = Formatting(
  tokenizer=load_tokenizer("bytes"),
  space=SPACE,
  regions=Regions(context=700, response=64, examples=2),
  chat="chatml",
  prompt="default",
  condition="persona",
)


def directions(**poles):
  directions_P = np.full(90, 0.5, np.float32)
  for name, pole in poles.items():
    directions_P[int(name[1:])] = pole
  return directions_P


def example(i, pair, comments, pairs=()):
  persona = Persona(
    tuple(UserComment("Tea?", "note", d) for d in comments),
    tuple(ComparedPair("Tea?", "this", "that", d) for d in pairs),
  )
  return Example(f"x:{i}", f"post {i}", "yes", "no", persona, pair)


EXAMPLES = [
  # Of one dimension, and another one is known of the user.
  example(0, directions(d3=1), [directions(d3=1, d7=0)]),
  example(1, directions(d4=0), [directions(d4=0)], [directions(d4=0, d9=1)]),
  # Of two, one of which the history does not tell.
  example(2, directions(d5=1, d6=0), [], [directions(d5=1, d8=1)]),
]


def agreement(says_P, label_P):
  """How far what P̃ says is what the pair is of: a margin that follows P̃ exactly."""
  return float(((says_P - 0.5) * (label_P - 0.5)).sum() * 4)


class Follows(Scorer):
  def _score(self, condition, shuffle=False, history=HistoryPolicy()):
    margins = []
    for e in self.examples:
      persona = sample_history(e.persona, history, np.random.default_rng(0))
      try:
        told = e.profile if condition == "profile" else infer_profile(e, persona, SPACE)
        margins.append(np.nan if told is None else agreement(SPACE.parse(told), e.directions))
      except Refused:
        margins.append(np.nan)
    return np.stack([margins, np.zeros(len(margins))], axis=1)


class Ignores(Scorer):
  def _score(self, condition, shuffle=False, history=HistoryPolicy()):
    return np.tile([1.0, 0.0], (len(self.examples), 1))


class Nothing(Scorer):
  def _score(self, *key):
    return np.zeros((len(self.examples), 2))


class FollowsTokens(BridgeScorer):
  def _score(self, condition, shuffle=False):
    says_XP = self.preferences(condition) @ [0, 0.5, 1]
    margin_X = [agreement(s, e.directions) for s, e in zip(says_XP, self.examples, strict=True)]
    return np.stack([margin_X, np.zeros(len(margin_X))], axis=1)


def scorer(kind, examples=EXAMPLES):
  return kind("stand-in", None, examples, FORMATTING, rows=1)


def found(rows, condition, protocol="matched"):
  (row,) = [r for r in rows if (r["condition"], r["protocol"]) == (condition, protocol)]
  return row


def test_a_policy_that_follows_words_turns_with_them():
  rows = control.profile_rows("pba", scorer(Follows), scorer(Nothing))
  for condition in ("reversed", "golden reversed", "strength -1"):
    for protocol in ("matched", "unconditioned"):
      row = found(rows, condition, protocol)
      # Of the third pair one of two dimensions may be steered: then nothing is left of it.
      assert row["flips"] >= (2 / 3 if condition == "strength -1" else 1)
      assert row["accuracy"] == 0 and row["change"] == -1
  for condition in ("strength +0", "strength +1", "another reversed"):
    row = found(rows, condition)
    assert (row["flips"], row["change"], row["accuracy"]) == (0, 0, 1)


def test_a_policy_that_ignores_words_never_turns():
  rows = control.profile_rows("pba", scorer(Ignores), scorer(Nothing))
  rows += control.history_rows("pba", "inferred", scorer(Ignores), scorer(Nothing))
  assert len({row["condition"] for row in rows}) == 8
  for row in rows:
    assert row["flips"] == row["flips_high"] == row["change"] == 0
    assert row["margin"] == row["margin_before"] == row["accuracy"] == 1


def test_the_reference_is_told_the_same_or_nothing():
  rows = control.profile_rows("pba", scorer(Follows), scorer(Follows))
  assert found(rows, "reversed", "matched")["margin"] == 0  # policy and reference are one
  rows = control.profile_rows("pba", scorer(Nothing), scorer(Follows))
  told, untold = (found(rows, "reversed", p) for p in ("matched", "unconditioned"))
  assert told["flips"] == 1 and untold["flips"] == 0


def test_exchanged_choices_count_against_comments_that_contradict_them():
  rows = control.history_rows("pba", "inferred", scorer(Follows), scorer(Nothing))
  whole, alone = found(rows, "exchanged"), found(rows, "pairs exchanged")
  # The first has no pair: left out. The comment of the second says what its pair said before:
  # together they say nothing of it, which is no flip. The third has no comment.
  assert whole["examples"] == alone["examples"] == 2
  assert (whole["flips"], alone["flips"]) == (0.5, 1)
  turned = control.exchanged(EXAMPLES)[1].persona
  assert turned.comments == EXAMPLES[1].persona.comments
  (pair,) = turned.pairs
  assert (pair.post, pair.chosen, pair.rejected) == ("Tea?", "that", "this")
  np.testing.assert_array_equal(pair.directions, directions(d4=1, d9=0))


@pytest.fixture
def bridge():
  """P̃ of 0.2, 0.2 and 0.6 on the first pair's pole, likewise on those of the others."""
  inferred_XPK = np.tile([0.1, 0.8, 0.1], (3, 90, 1))
  for i, e in enumerate(EXAMPLES):
    for d in np.flatnonzero(e.directions != 0.5):
      inferred_XPK[i, d] = [0.2, 0.2, 0.6] if e.directions[d] else [0.6, 0.2, 0.2]
  inferred_XPK[:, 20] = [0.0, 0.3, 0.7]
  return FollowsTokens("pba_head", None, EXAMPLES, FORMATTING, 1, inferred_XPK)


def test_a_dose_of_one_dimension_as_worked_out_by_hand(bridge):
  one = dataclasses.replace(bridge, examples=EXAMPLES[:2], inferred_XPK=bridge.inferred_XPK[:2])
  infer = lambda examples, history: one.inferred_XPK
  rows = control.bridge_rows("pba_head", one, scorer(Nothing, EXAMPLES[:2]), infer)
  margins = {s: found(rows, control.strength(s))["margin"] for s in control.STRENGTHS}
  # p(user's pole) − p(the other), 0.6 − 0.2 at first; s takes 1 − s of it and adds ±s.
  worked = {-1: -1, -0.75: -0.65, -0.5: -0.3, -0.25: 0.05, 0: 0.4}
  worked |= {0.25: 0.55, 0.5: 0.7, 0.75: 0.85, 1: 1}
  assert margins == pytest.approx(worked)
  flips = {s: found(rows, control.strength(s))["flips"] for s in control.STRENGTHS}
  assert flips == {s: float(s <= -0.5) for s in control.STRENGTHS}
  # What the pair is not of, and P̃ is surest of, does nothing.
  other = found(rows, "another reversed")
  assert other["margin"] == other["margin_before"] == pytest.approx(0.4)
  for condition in ("reversed", "golden reversed"):
    assert found(rows, condition)["flips"] == 1
  assert found(rows, "exchanged")["flips"] == 0  # this bridge infers the same of any history


def test_steering_is_that_of_preferences(bridge):
  touch = control.touched(EXAMPLES, FORMATTING, bridge.inferred_XPK @ [0, 0.5, 1])
  assert (touch.own_X[0], touch.own_pole_X[0]) == (3, 1)
  assert (touch.other_X == 20).all() and (touch.other_pole_X == 1).all()
  for s in control.STRENGTHS:
    steered_XPK = control.steer(bridge.inferred_XPK, touch.own_X, touch.own_pole_X, s)
    for i, p_PK in enumerate(bridge.inferred_XPK):
      dimension = SPACE.dimensions[touch.own_X[i]]
      positive = bool(touch.own_pole_X[i]) != (s < 0)
      pole = dimension.positive if positive else dimension.negative
      expected = Preferences(SPACE, p_PK).with_preferences({pole: abs(s)})
      np.testing.assert_allclose(steered_XPK[i], expected.probabilities_PK, atol=1e-12)


def test_pairs_without_labels_are_not_steered_and_counted():
  examples = [*EXAMPLES, dataclasses.replace(EXAMPLES[0], directions=None)]
  touch = control.touched(examples, FORMATTING, np.full((4, 90), 0.5))
  assert touch.own_X[3] == touch.other_X[3] == -1
  before_XN, after_XN = np.tile([1.0, 0], (4, 1)), np.tile([-1.0, 0], (4, 1))
  after_XN[3] = np.nan
  (row,) = changed("p", "c", "matched", examples, before_XN, after_XN)
  assert (row["examples"], row["refused"], row["flips"]) == (3, 1, 1)
  assert changed("p", "c", "matched", examples, before_XN, np.nan * after_XN) == []


def test_a_margin_that_comes_to_nothing_has_not_turned():
  before_XN, after_XN = np.eye(2)[[0, 0, 1]], np.array([[0.0, 0], [-1, 0], [-1, 0]])
  (row,) = changed("p", "c", "matched", EXAMPLES, before_XN, after_XN)
  assert row["flips"] == pytest.approx(1 / 3) and row["change"] == pytest.approx(-2 / 3)
  table = format_changes([row])
  assert "33.3 [" in table and "-66.7 [" in table and table.count("\n") == 2
