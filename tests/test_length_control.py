"""Length control: the fit against scipy's, and what it says where lengths decide everything."""

import numpy as np
import pytest
from scipy.optimize import minimize

from alignx_jax.evaluation.length_control import PRIOR, fit, length_controlled


def sigmoid(x):
  return 1 / (1 + np.exp(-x))


def pairs(seed, *, theta, phi, shift=40.0, count=300):
  """Outcomes and differences of lengths; the first is longer by `shift` characters, usually."""
  rng = np.random.default_rng(seed)
  difference_X = np.round(rng.normal(shift, 80, count))
  feature_X = np.tanh(difference_X / difference_X.std())
  return (rng.random(count) < sigmoid(theta + phi * feature_X)).astype(float), difference_X


def test_the_fit_is_scipys_with_weights_and_ties():
  outcome_X, difference_X = pairs(0, theta=0.4, phi=1.3, count=80)
  outcome_X[:9] = 0.5
  feature_X = np.tanh(difference_X / difference_X.std())
  weight_SX = np.random.default_rng(1).integers(0, 4, size=(5, 80)).astype(float)
  for weight_X, found_2 in zip(weight_SX, fit(outcome_X, feature_X, weight_SX), strict=True):

    def loss(beta, weight_X=weight_X):
      q = sigmoid(beta[0] + beta[1] * feature_X)
      entropy = outcome_X * np.log(q) + (1 - outcome_X) * np.log(1 - q)
      return -(weight_X * entropy).sum() + (beta @ beta) / (2 * PRIOR**2)

    expected = minimize(loss, np.zeros(2), method="BFGS", options={"gtol": 1e-7})
    np.testing.assert_allclose(found_2, expected.x, atol=2e-5)


def test_a_case_worked_by_hand():
  # Two lengths apart by ±d: the feature is ±tanh 1, and each side is fitted by itself, but for the
  # weak prior. Of the longer 3 of 4 are won, of the shorter 2 of 4: log-odds log 3 and 0.
  outcome_X = np.tile([1, 1, 1, 0, 1, 1, 0, 0], 50).astype(float)
  difference_X = np.tile([7, 7, 7, 7, -7, -7, -7, -7], 50)
  found = length_controlled(outcome_X, difference_X, range(400))
  assert found.model_term == pytest.approx(np.log(3) / 2, abs=1e-3)
  assert found.length_term == pytest.approx(np.log(3) / 2 / np.tanh(1), abs=1e-3)
  assert found.win_rate == pytest.approx(sigmoid(np.log(3) / 2), abs=1e-3)
  assert found.longer == 0.5 and not found.remark


def test_where_length_alone_decides_nothing_is_left_at_equal_length():
  rates = []
  for seed in range(8):
    outcome_X, difference_X = pairs(seed, theta=0.0, phi=4.0)
    feature_X = np.tanh(difference_X / difference_X.std())
    ((theta, phi),) = fit(outcome_X, feature_X, np.ones((1, 300)))
    assert outcome_X.mean() > 0.6 and phi > 3
    rates.append(sigmoid(theta))
  assert np.mean(rates) == pytest.approx(0.5, abs=0.03)
  # The longer one always: the fit stays finite, and even is within its interval.
  outcome_X = (np.sign(difference_X) + 1) / 2
  found = length_controlled(outcome_X, difference_X, range(300))
  assert found.low < 0.5 < found.high


def test_where_length_does_not_matter_the_rate_stays():
  outcome_X, difference_X = pairs(3, theta=0.8, phi=0.0)
  found = length_controlled(outcome_X, difference_X, range(300))
  assert found.win_rate == pytest.approx(outcome_X.mean(), abs=0.03)
  assert found.low < sigmoid(0.8) < found.high
  # Equal lengths all: the rate itself.
  found = length_controlled(outcome_X, np.zeros(300), range(300))
  assert found.win_rate == pytest.approx(outcome_X.mean(), abs=1e-3)


def test_the_other_way_round_is_the_rest():
  outcome_X, difference_X = pairs(4, theta=0.5, phi=1.0, count=100)
  one = length_controlled(outcome_X, difference_X, range(100))
  other = length_controlled(1 - outcome_X, -difference_X, range(100))
  assert one.win_rate + other.win_rate == pytest.approx(1)
  assert one.low + other.high == pytest.approx(1)


def test_users_are_resampled_whole():
  outcome_X, difference_X = pairs(5, theta=0.3, phi=1.0, count=40)
  one = length_controlled(np.tile(outcome_X, 5), np.tile(difference_X, 5), list(range(40)) * 5)
  alone = length_controlled(outcome_X, difference_X, range(40))
  assert one.high - one.low == pytest.approx(alone.high - alone.low, rel=0.05)


def test_what_cannot_be_told_is_not():
  found = length_controlled(np.ones(9), np.full(9, 5.0), range(9))
  assert found.win_rate is None and "longer by the same" in found.remark
  found = length_controlled(np.ones(9), np.arange(1.0, 10), range(9))
  assert "extrapolated" in found.remark and 0.5 < found.win_rate < 1
  found = length_controlled(np.ones(9), np.arange(-4.0, 5), range(9))
  assert not found.remark and found.win_rate > 0.98  # all are won, whatever their length
