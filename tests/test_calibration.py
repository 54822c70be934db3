"""Calibration and macro-F1 of inferred preferences, against values worked by hand."""

import json
import re
import time

import numpy as np
import pytest

from alignx_jax.evaluation import calibration, results
from alignx_jax.personas.preferences import Dimension, PreferenceSpace, alignx_space

NAN = np.nan


def draw(probabilities_XPK, seed):
  """Labels drawn from the probabilities, which are therefore perfectly calibrated."""
  uniform_XP1 = np.random.default_rng(seed).random((*probabilities_XPK.shape[:2], 1))
  above_XPK = uniform_XP1 > probabilities_XPK.cumsum(-1)
  return calibration.DIRECTIONS_K[above_XPK[..., :2].sum(-1)]


def hidden(share=0.5):
  """Which entries of DIRECTIONS to hide."""
  return np.random.default_rng(2).random(DIRECTIONS.shape) < share


# 600 users, mostly neutral.
LOGITS = 1.5 * np.random.default_rng(0).normal(size=(600, 90, 3)) + np.array([-1.0, 2.0, -1.0])
PROBABILITIES = calibration.softmax(LOGITS)
DIRECTIONS = draw(PROBABILITIES, seed=1)
# Two users, two dimensions.
FOUR = np.array([[[0.1, 0.2, 0.7], [0.04, 0.9, 0.06]], [[0.72, 0.2, 0.08], [0.3, 0.6, 0.1]]])
FOUR_LABELS = np.array([[1, 0.5], [1, 0]])


def test_ece_of_four_entries():
  # Bins of a fifth. (0.6, 0.8]: confidences 0.7 and 0.72, one right of two. (0.8, 1]: 0.9,
  # right. (0.4, 0.6]: 0.6, wrong.
  expected = (abs(1 - 1.42) + abs(1 - 0.9) + abs(0 - 0.6)) / 4
  assert calibration.expected_calibration_error(FOUR, FOUR_LABELS, 5) == pytest.approx(expected)


def test_pole_ece_of_four_entries():
  # Poles of at least 0.05: 0.1 0.7 | 0.06 | 0.72 0.08 | 0.3 0.1. Of them 0.7 (user 0),
  # 0.08 (user 1, positive) and 0.3 (user 1, negative) are the labels.
  expected = (abs(1 - (0.1 + 0.06 + 0.08 + 0.1)) + abs(1 - 0.3) + abs(1 - 1.42)) / 7
  assert calibration.pole_calibration_error(FOUR, FOUR_LABELS, 5) == pytest.approx(expected)
  every = (abs(1 - (0.1 + 0.04 + 0.06 + 0.08 + 0.1)) + abs(1 - 0.3) + abs(1 - 1.42)) / 8
  found = calibration.pole_calibration_error(FOUR, FOUR_LABELS, 5, at_least=0.0)
  assert found == pytest.approx(every)


def test_reliability_of_four_entries():
  bins = calibration.reliability(FOUR, FOUR_LABELS, 5)
  assert [b["count"] for b in bins] == [4, 1, 2]
  assert [b["predicted"] for b in bins] == pytest.approx([0.085, 0.3, 0.71])
  assert [b["observed"] for b in bins] == [0.25, 1.0, 0.5]
  first = calibration.reliability(FOUR, FOUR_LABELS, 5, dimensions=[0])
  assert [b["count"] for b in first] == [2, 2]


def test_a_value_on_an_edge_belongs_to_the_bin_below():
  probabilities = np.array([[[0.2, 0.8, 0.0], [1.0, 0.0, 0.0]]])
  bins = calibration.reliability(probabilities, [[0.5, 0]], 5)
  assert [(b["predicted"], b["count"]) for b in bins] == [(0.2, 1), (1.0, 1)]


def test_a_calibrated_model_has_no_error_but_that_of_chance():
  row = calibration.preference_results({"true": PROBABILITIES}, DIRECTIONS)[0]
  assert row["ece"] < 0.01 and row["ece_poles"] < 0.01
  sharper = calibration.softmax(LOGITS, 0.4)
  assert calibration.expected_calibration_error(sharper, DIRECTIONS) > 0.08
  assert calibration.pole_calibration_error(sharper, DIRECTIONS) > 0.1


def test_chance_is_what_calibrated_models_show_of_few_labels():
  few = PROBABILITIES[:200, :4]
  found = [
    calibration.preference_results({"true": few}, draw(few, i), samples=2)[0] for i in range(40)
  ]
  for key in ("ece", "ece_poles"):
    mean = np.mean([row[key] for row in found])
    assert mean == pytest.approx(found[0][f"{key}_chance"], rel=0.12)
    assert mean > 0.01  # Few labels alone make this much.


def test_softmax_is_stable_and_divides_by_the_temperature():
  np.testing.assert_allclose(calibration.softmax([[0.0, np.log(3.0)]]), [[0.25, 0.75]])
  np.testing.assert_allclose(calibration.softmax([[0.0, np.log(9.0)]], 2.0), [[0.25, 0.75]])
  np.testing.assert_array_equal(calibration.softmax([[1e5, -1e5, 0.0]]), [[1, 0, 0]])
  for temperature in (0.0, -1.0, NAN):
    with pytest.raises(ValueError, match="above 0"):
      calibration.softmax([0.0, 1.0], temperature)


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.5])
def test_a_known_temperature_is_recovered(temperature):
  assert calibration.fit_temperature(temperature * LOGITS, DIRECTIONS) == pytest.approx(
    temperature, rel=0.03
  )


def test_the_fitted_temperature_is_the_best_nearby_and_calibrates():
  logits = 3 * LOGITS

  def loss(temperature):
    probabilities = calibration.softmax(logits, temperature)
    label = (2 * DIRECTIONS).astype(int)[..., None]
    return -np.log(np.take_along_axis(probabilities, label, -1)).mean()

  best = calibration.fit_temperature(logits, DIRECTIONS)
  assert loss(best) <= min(loss(best * 0.999), loss(best * 1.001), loss(1.0))
  before = calibration.softmax(logits)
  after = calibration.softmax(logits, best)
  assert calibration.expected_calibration_error(after, DIRECTIONS) < 0.02
  np.testing.assert_array_equal(calibration.most_probable(before), calibration.most_probable(after))


def test_temperatures_without_a_minimum_stop_at_the_bounds():
  right = np.array([[[0.5, 0.0, 0.0], [0.0, 0.0, 0.5]]])
  assert calibration.fit_temperature(right, [[0, 1]]) == pytest.approx(0.05, rel=1e-4)
  assert calibration.fit_temperature(right, [[1, 0]]) == pytest.approx(20, rel=1e-4)
  assert calibration.fit_temperature(np.zeros((1, 2, 3)), [[0, 1]]) == 1


def test_fit_temperature_refuses_what_it_cannot_fit():
  with pytest.raises(ValueError, match="No entry is labelled"):
    calibration.fit_temperature(LOGITS, np.full(DIRECTIONS.shape, NAN))
  with pytest.raises(ValueError, match="NaN or infinite"):
    calibration.fit_temperature(np.full((1, 1, 3), NAN), [[1]])
  with pytest.raises(ValueError, match="Shape"):
    calibration.fit_temperature(LOGITS[:, :3], DIRECTIONS)


def test_macro_f1_by_hand():
  labels = np.array([[0, 0, 0.5, 0.5], [0.5, 1, 1, 1]])
  predicted = np.array([[0, 0.5, 0.5, 0.5], [1, 1, 0, 1]])
  # negative: 1 hit, 2 predicted, 2 labelled; neutral 2, 3, 3; positive 2, 3, 3.
  expected = (2 * 1 / 4 + 2 * 2 / 6 + 2 * 2 / 6) / 3
  assert calibration.macro_f1(predicted, labels) == pytest.approx(expected)
  assert calibration.macro_f1(labels, labels) == 1


def test_a_direction_neither_said_nor_labelled_counts_as_zero():
  assert calibration.macro_f1([[0.5, 1]], [[0.5, 1]]) == pytest.approx(2 / 3)
  assert np.isnan(calibration.macro_f1([[0.5, 1]], [[NAN, NAN]]))


def test_what_is_unknown_is_left_out_everywhere():
  labels = np.where(hidden(), NAN, DIRECTIONS)
  other = PROBABILITIES.copy()
  other[hidden()] = NAN  # Whatever is said of it, even nothing.
  for measure in (
    calibration.expected_calibration_error,
    calibration.pole_calibration_error,
    calibration.reliability,
    lambda p, d: calibration.macro_f1(calibration.most_probable(p), d),
    lambda p, d: calibration.preference_results({"a": p}, d, samples=5),
  ):
    assert measure(other, labels) == measure(PROBABILITIES, labels)
    assert measure(PROBABILITIES, labels) != measure(PROBABILITIES, DIRECTIONS)
  logits = np.where(hidden()[..., None], NAN, LOGITS)
  assert calibration.fit_temperature(logits, labels) == calibration.fit_temperature(LOGITS, labels)
  none = np.full(DIRECTIONS.shape, NAN)
  assert np.isnan(calibration.expected_calibration_error(PROBABILITIES, none))
  assert np.isnan(calibration.pole_calibration_error(PROBABILITIES, none))
  assert calibration.reliability(PROBABILITIES, none) == []


def test_majority_takes_each_dimensions_most_common_direction():
  training = np.array([[1, 0, 1, NAN], [1, NAN, 0, NAN], [0.5, 0, NAN, NAN]])
  np.testing.assert_array_equal(
    calibration.frequencies(training),
    [[0, 1 / 3, 2 / 3], [1, 0, 0], [0.5, 0, 0.5], [0, 1, 0]],
  )
  np.testing.assert_array_equal(calibration.majority(training), [1, 0, 0, 0.5])
  np.testing.assert_array_equal(calibration.majority([[1, 0], [0.5, 0.5]]), [0.5, 0.5])


def test_the_interval_is_that_of_resampled_users():
  predicted = calibration.most_probable(PROBABILITIES)[:60]
  labels = np.where(hidden(0.3), NAN, DIRECTIONS)[:60]
  row = calibration.preference_results({"a": predicted}, labels, samples=2000)[0]
  rng = np.random.default_rng(1)
  draws = [rng.integers(60, size=60) for _ in range(2000)]
  slow = [calibration.macro_f1(predicted[i], labels[i]) for i in draws[:600]]
  low, high = np.percentile(slow, [2.5, 97.5])
  assert (row["low"], row["high"]) == pytest.approx((low, high), abs=0.006)
  assert row["low"] < row["macro_f1"] < row["high"]


def test_users_of_whom_nothing_is_known_change_nothing():
  labels = np.concatenate([DIRECTIONS[:50], np.full((50, 90), NAN)])
  few, many = (
    calibration.preference_results({"a": PROBABILITIES[: len(d)]}, d)
    for d in (DIRECTIONS[:50], labels)
  )
  assert few == many and few[0]["users"] == 50 and few[0]["labels"] == 50 * 90


def test_a_row_for_each_predictor():
  majority = calibration.majority(DIRECTIONS)
  rows = calibration.preference_results(
    {"head": PROBABILITIES, "labels": DIRECTIONS, "majority": majority}, DIRECTIONS
  )
  assert [row["predictor"] for row in rows] == ["head", "labels", "majority"]
  assert [row["ece"] is None for row in rows] == [False, True, True]
  assert rows[0]["macro_f1"] > rows[2]["macro_f1"] and rows[1]["macro_f1"] == 1
  assert {(row["users"], row["labels"]) for row in rows} == {(600, 54_000)}
  json.dumps(rows, allow_nan=False)


def test_rows_of_a_common_size_take_little_time():
  start = time.perf_counter()
  calibration.preference_results({"head": PROBABILITIES}, DIRECTIONS, samples=500)
  assert time.perf_counter() - start < 2


def test_groups_are_measured_on_their_own_dimensions():
  space = alignx_space()
  labels = DIRECTIONS.copy()
  labels[:, space.groups["big_five"]] = NAN
  rows = calibration.group_results(
    space, {"head": PROBABILITIES, "majority": calibration.majority(labels)}, labels, samples=20
  )
  assert [row["group"] for row in rows] == [g for g in space.groups for _ in range(2)]
  assert sum(row["labels"] for row in rows) == 2 * 600 * 85
  for row in rows[::2]:
    dimensions = space.groups[row["group"]]
    if row["group"] == "big_five":
      assert row["labels"] == 0 and row["macro_f1"] is None and row["ece"] is None
    else:
      assert row["ece_poles"] == calibration.pole_calibration_error(
        PROBABILITIES[:, dimensions], labels[:, dimensions]
      )
  table = calibration.format_preference_table(rows)
  assert len(table.splitlines()) == 2 + len(rows) and "| murray_needs " in table


def test_table_holds_the_rows_in_order():
  rows = calibration.preference_results(
    {"head": PROBABILITIES, "a | b": calibration.majority(DIRECTIONS)}, DIRECTIONS
  )
  head, rule, *lines = calibration.format_preference_table(rows).splitlines()
  assert len({len(line) for line in (head, rule, *lines)}) == 1
  assert set(rule) <= set("|-: ")
  for line, row in zip(lines, rows, strict=True):
    name, f1, ece, poles, users, labels = re.split(r"(?<!\\)\|", line.strip("|"))
    assert name.strip().replace("\\|", "|") == row["predictor"]
    expected = [round(100 * row[key], 1) for key in ("macro_f1", "low", "high")]
    assert [float(n) for n in re.findall(r"[\d.]+", f1)] == expected
    if row["ece"] is None:
      assert ece.strip() == poles.strip() == "–"
    else:
      expected = [round(100 * row[key], 1) for key in ("ece_poles", "ece_poles_chance")]
      assert [float(n) for n in re.findall(r"[\d.]+", poles)] == expected
    assert (int(users), int(labels)) == (row["users"], row["labels"])
  assert calibration.format_preference_table([]) == results.EMPTY
  with pytest.raises(ValueError, match=r"rows\[0\]\['ece'\] is 4.1: give a share"):
    calibration.format_preference_table([rows[0] | {"ece": 4.1}])
  with pytest.raises(ValueError, match=r"rows\[1\] has no 'labels'"):
    short = {key: value for key, value in rows[1].items() if key != "labels"}
    calibration.format_preference_table([rows[0], short])


@pytest.mark.parametrize(
  "predicted, message",
  [
    (LOGITS, "add up to 1; are they logits"),
    (PROBABILITIES[:, :4], "Shape"),
    (np.full(PROBABILITIES.shape, NAN), "no probabilities"),
    (np.full(DIRECTIONS.shape, 0.4), "0.4 is no direction"),
    (np.full(DIRECTIONS.shape, NAN), "no prediction"),
    (DIRECTIONS[:, :4], "Predictions"),
  ],
)
def test_a_predictor_that_does_not_fit_is_named(predicted, message):
  with pytest.raises(ValueError, match=f"mine: .*{message}"):
    calibration.preference_results({"mine": predicted}, DIRECTIONS)


def test_labels_that_are_none_are_refused():
  with pytest.raises(ValueError, match="No entry is labelled"):
    calibration.preference_results({}, np.full((2, 3), NAN))
  with pytest.raises(ValueError, match="2.0 is no direction"):
    calibration.macro_f1([[1]], [[2]])


def test_a_bfloat16_softmax_is_a_distribution():
  coarse = (PROBABILITIES.astype(np.float32).view(np.uint32) & 0xFFFF0000).view(np.float32)
  assert np.abs(coarse.sum(-1) - 1).max() > 1e-3
  found = calibration.expected_calibration_error(coarse, DIRECTIONS)
  assert found == pytest.approx(
    calibration.expected_calibration_error(PROBABILITIES, DIRECTIONS), abs=0.005
  )


def test_any_space_will_do():
  space = PreferenceSpace((Dimension("a", "p", "n"), Dimension("b", "q", "m")))
  rows = calibration.group_results(space, {"x": FOUR}, FOUR_LABELS, samples=5)
  assert [(row["group"], row["users"], row["labels"]) for row in rows] == [("a", 2, 2), ("b", 2, 2)]
