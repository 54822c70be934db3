"""Figures of groups and their gaps, against hand-worked values and known truths."""

import dataclasses

import numpy as np
import pytest

from alignx_jax.data.records import Example
from alignx_jax.evaluation.accuracy import bootstrap_interval
from alignx_jax.evaluation.bias import audit_groups, groups_of
from alignx_jax.evaluation.counterfactual import Seen, counterfactual_rows, counterfactuals
from alignx_jax.personas.demographics import NOT_STATED
from alignx_jax.personas.persona import Persona, UserComment
from alignx_jax.personas.preferences import alignx_space

SPACE = alignx_space()


def _example(i, description="", directions=None):
  persona = Persona(comments=(UserComment("Tea?", f"note {i}"),), description=description)
  return Example(f"x:{i}", f"post {i % 12}", "yes", "no", persona, directions)


def _posts(count, posts=12):
  return [f"post {i % posts}" for i in range(count)]


def test_figures_by_hand():
  # σ(log 3) = 0.75: 24 right of 40 at this confidence are 60 %.
  margin_X = np.log(3) * np.array([1.0] * 24 + [-1.0] * 16)
  (row,), gaps = audit_groups("gender", ["female"] * 40, margin_X, _posts(40))
  assert not gaps
  assert (row["examples"], row["posts"], row["enough"]) == (40, 12, True)
  assert row["accuracy"] == pytest.approx(0.6)
  assert row["margin"] == pytest.approx(np.log(3) * 0.2)
  assert row["overconfidence"] == pytest.approx(0.15)
  assert row["ece"] == pytest.approx(0.15)  # all confidences are in one bin
  low, high = bootstrap_interval(margin_X > 0, _posts(40), samples=4000)
  assert row["accuracy_low"] == pytest.approx(low, abs=0.03)
  assert row["accuracy_high"] == pytest.approx(high, abs=0.03)


def _two_groups(gap, *, pairs=800, seed=0):
  rng = np.random.default_rng(seed)
  groups = rng.choice(["female", "male", NOT_STATED], size=pairs)
  right_X = rng.random(pairs) < np.where(groups == "male", 0.8 - gap, 0.8)
  return groups.tolist(), np.where(right_X, 1.0, -1.0) * rng.exponential(1.0, pairs)


def test_a_gap_that_is_there_is_found_and_one_that_is_not_is_covered():
  groups, margin_X = _two_groups(0.3)
  rows, (gap,) = audit_groups("gender", groups, margin_X, _posts(800, 80))
  assert [row["group"] for row in rows] == ["female", "male", NOT_STATED]
  assert gap["groups"] == ["female", "male"]
  assert 0.15 < gap["accuracy_low"] < gap["accuracy"] < gap["accuracy_high"] < 0.45
  assert gap["accuracy"] == pytest.approx(rows[0]["accuracy"] - rows[1]["accuracy"])
  assert gap["overconfidence_high"] < 0  # as sure, and wrong more often
  covered = 0
  for seed in range(20):
    groups, margin_X = _two_groups(0.0, seed=seed)
    _, (gap,) = audit_groups("gender", groups, margin_X, _posts(800, 80), samples=300)
    covered += gap["accuracy_low"] <= 0 <= gap["accuracy_high"]
  assert covered >= 17


def test_groups_too_small_are_said_to_be_so():
  groups = ["young"] * 40 + ["older"] * 29 + ["middle-aged"] * 40
  posts = _posts(69) + ["one post"] * 40
  rows, gaps = audit_groups("age", groups, np.ones(109), posts)
  assert {row["group"]: row["enough"] for row in rows} == {
    "young": True,
    "middle-aged": False,
    "older": False,
  }
  small = rows[-1]
  assert small["examples"] == 29 and small["accuracy"] is None and small["ece"] is None
  assert len(gaps) == 3 and not any(gap["enough"] or gap["accuracy"] for gap in gaps)


def test_pairs_that_were_not_scored_are_left_out():
  margin_X = np.where(np.arange(60) < 20, np.nan, 1.0)
  (row,), _ = audit_groups("gender", ["male"] * 60, margin_X, _posts(60))
  assert row["examples"] == 40
  assert audit_groups("gender", ["male"] * 3, np.full(3, np.nan), _posts(3)) == ([], [])


def test_a_loss_without_probabilities_has_no_calibration():
  (row,), _ = audit_groups("gender", ["male"] * 60, np.ones(60), _posts(60), probabilities=False)
  assert row["overconfidence"] is None and row["ece"] is None and row["accuracy"] == 1


def test_groups_are_what_users_state_and_what_records_say():
  directions = np.full(90, 0.5, np.float32)
  directions[0] = 0
  examples = [_example(0, "A woman.", directions), _example(1, "", None)]
  for by, expected in (
    ("age", [NOT_STATED, NOT_STATED]),
    ("gender", ["female", NOT_STATED]),
    ("Young", ["negative", "not known"]),
    ("Older", ["positive", "not known"]),
    ("Male", ["neutral", "not known"]),
  ):
    assert groups_of(examples, by, SPACE) == expected
  with pytest.raises(ValueError, match="no pole"):
    groups_of(examples, "Yuong", SPACE)


def test_counterfactuals_change_the_statement_alone():
  examples = [_example(0, "A 25-year-old man; he sails."), _example(1, "A sailor.")]
  found = counterfactuals(examples)
  assert [(swap.index, *swap[1:4], swap.pronouns) for swap in found] == [
    (0, "gender", "male", "female", True),
    (0, "age", "young", "middle-aged", False),
    (0, "age", "young", "older", False),
  ]
  text = found[0].example.persona.description
  assert text == "A 25-year-old woman; he sails."
  persona = dataclasses.replace(
    found[0].example.persona, description="A 25-year-old man; he sails."
  )
  assert dataclasses.replace(found[0].example, persona=persona) == examples[0]


def test_changes_flips_and_variation_by_hand():
  examples = [_example(i, "A woman.") for i in range(48)]
  swaps = counterfactuals(examples)
  old_X = np.where(np.arange(48) % 4 == 0, 0.5, 2.0)
  inferred_XPK = np.zeros((48, 90, 3))
  inferred_XPK[..., 1] = 1
  other_XPK = inferred_XPK.copy()
  other_XPK[:, 7] = [0.4, 0.6, 0.0]
  before, after = Seen(old_X, inferred_XPK), Seen(old_X - 1, other_XPK)
  (row,) = counterfactual_rows(swaps, before, after, SPACE)
  assert (row["before"], row["after"], row["examples"]) == ("female", "male", 48)
  assert row["change"] == row["change_low"] == -1 and row["absolute"] == 1
  assert row["flips"] == 0.25 and row["flips_low"] <= 0.25 <= row["flips_high"]
  assert row["variation"] == pytest.approx(0.4 / 90)
  assert row["dimensions"][0]["dimension"] == SPACE.dimensions[7].positive
  assert row["dimensions"][0]["variation"] == pytest.approx(0.4)
  (few,) = counterfactual_rows(swaps[:20], before, Seen(old_X[:20], other_XPK[:20]), SPACE)
  assert not few["enough"] and few["change"] is None and few["variation"] is None
