"""Paired comparisons against scipy and against what can be worked out by hand."""

import numpy as np
import pytest
from scipy.stats import binomtest

from alignx_jax.evaluation.significance import compare_pairs, mcnemar, paired_interval


@pytest.mark.parametrize(
  ("first_only", "second_only"), [(1, 0), (0, 6), (3, 9), (10, 10), (41, 17), (480, 520), (0, 900)]
)
def test_p_is_that_of_an_exact_binomial_test(first_only, second_only):
  expected = binomtest(first_only, first_only + second_only).pvalue
  assert mcnemar(first_only, second_only) == pytest.approx(expected, rel=1e-9)
  assert mcnemar(second_only, first_only) == mcnemar(first_only, second_only)


def test_p_of_very_many_is_near_the_exact_one():
  assert mcnemar(0, 0) == 1
  for least, most in ((5400, 5500), (5900, 6300), (20_000, 20_001)):
    assert mcnemar(least, most) == pytest.approx(binomtest(least, least + most).pvalue, rel=2e-3)


def test_the_interval_of_independent_pairs_is_about_the_normal_one():
  difference = np.repeat([1.0, 0.0, -1.0], [200, 700, 100])
  low, high = paired_interval(difference, range(1000))
  error = 1.96 * difference.std() / np.sqrt(1000)
  assert low == pytest.approx(0.1 - error, abs=0.004)
  assert high == pytest.approx(0.1 + error, abs=0.004)


def test_pairs_of_one_user_do_not_narrow_the_interval():
  users = np.tile(np.arange(100), 9)
  difference = (users % 3 - 1.0) * (users % 2)
  width = lambda groups: np.ptp(paired_interval(difference, groups))
  # A user's nine pairs are alike, so the error is three times that of 900 independent pairs.
  assert width(users) == pytest.approx(3 * width(range(900)), rel=0.15)


def _columns(ids, correct, users=None):
  ids = [str(id) for id in ids]
  users = np.array(users or ids, object)
  return {"id": np.array(ids, object), "user": users, "post": users, "correct": np.array(correct)}


def test_pairs_are_matched_by_id_and_who_is_left_out_is_counted():
  first = _columns([0, 1, 2, 3, 4, 9], [1.0, 1, 0, 1, np.nan, 1])
  second = _columns([5, 4, 3, 2, 1, 0], [0.0, 1, 1, 1, 0, 0])
  found = compare_pairs(first, second)
  assert (found["pairs"], found["unscored"]) == (4, 1)
  assert (found["only_in_first"], found["only_in_second"]) == (1, 1)
  # Of ids 0 to 3 the first has 1, 1, 0, 1 and the second 0, 0, 1, 1.
  assert (found["first"], found["second"], found["difference"]) == (0.75, 0.5, -0.25)
  assert (found["first_only"], found["second_only"]) == (2, 1)
  assert found["p"] == pytest.approx(binomtest(1, 3).pvalue)


def test_without_a_common_pair_there_is_no_figure():
  found = compare_pairs(_columns([0, 1], [1.0, np.nan]), _columns([1, 2], [1.0, 0]))
  assert found == {"pairs": 0, "only_in_first": 1, "only_in_second": 1, "unscored": 1}


def test_an_id_that_occurs_twice_is_refused():
  with pytest.raises(ValueError, match="The second has 1 record ids twice"):
    compare_pairs(_columns([0, 1], [1.0, 1]), _columns([1, 1], [1.0, 0]))
