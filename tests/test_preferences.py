"""Directions to profile text and back, against the AlignX release's own profiles."""

import itertools
import json
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from alignx_jax.personas.preferences import Dimension, PreferenceSpace, alignx_space

SPACE = alignx_space()
DIRECTIONS = st.sampled_from([0.0, 0.5, 1.0])


def vector(**at):
  """All neutral but for the directions given as d<index>=value."""
  directions_P = np.full(90, 0.5)
  for name, direction in at.items():
    directions_P[int(name[1:])] = direction
  return directions_P


def test_the_space_is_the_published_one(goldens):
  published = json.loads((goldens / "preference_space.json").read_text(encoding="utf-8"))
  assert len(SPACE) == len(published) == 90
  for index, (ours, theirs) in enumerate(zip(SPACE.dimensions, published, strict=True)):
    assert theirs["index"] == index
    assert (ours.group, ours.positive, ours.negative) == (
      theirs["group"],
      theirs["positive"],
      theirs["negative"],
    )


def test_groups_share_out_the_dimensions():
  assert sorted(index for group in SPACE.groups.values() for index in group) == list(range(90))
  for name, indices in SPACE.groups.items():
    assert {SPACE.dimensions[i].group for i in indices} == {name}
    assert indices == sorted(indices)


def test_profiles_are_those_of_the_release(goldens):
  cases = json.loads((goldens / "profile_goldens.json").read_text(encoding="utf-8"))
  profiles = [SPACE.verbalise(SPACE.aggregate(g["history_directions"])) for g in cases]
  assert len(profiles) == 40
  assert profiles == [g["profile"] for g in cases]


@settings(deadline=None, max_examples=60)
@given(st.lists(DIRECTIONS, min_size=90, max_size=90) | st.just([0.0] * 90) | st.just([1.0] * 90))
def test_parse_inverts_verbalise(directions):
  np.testing.assert_array_equal(SPACE.parse(SPACE.verbalise(directions)), directions)


@pytest.mark.parametrize("directions", itertools.product([0, 0.5, 1], repeat=2))
def test_a_pole_may_begin_with_another_one(directions):
  dimensions = (
    Dimension("drinks", "Likes tea", "Dislikes tea"),
    Dimension("drinks", "Likes tea, black", "Dislikes tea, black"),
  )
  space = PreferenceSpace(dimensions)
  np.testing.assert_array_equal(space.parse(space.verbalise(directions)), directions)


def test_verbalise_joins_poles_in_index_order():
  first, last = SPACE.dimensions[0], SPACE.dimensions[-1]
  assert SPACE.verbalise(vector(d89=0, d0=1)) == f"{first.positive}, {last.negative}"
  assert SPACE.verbalise(vector()) == ""


def test_aggregate_by_hand():
  # Five items: one column a dimension.
  history_5xD = np.array(
    [
      [1, 1, 0.0, 0.0, 1.0, 0.5],
      [1, 1, 0.5, 0.0, 0.5, 0.5],
      [1, 0, 0.5, 0.5, 0.5, 0.5],
      [0, 0, 0.5, 0.5, 0.5, 0.5],
      [0, 0, 0.5, 0.5, 0.5, 0.5],
    ]
  )  # 0.6, 0.4, 0.4, 0.3, 0.6, 0.5: 0.6 is reached, and 0.4 is not below 0.4
  history_KP = np.full((5, 90), 0.5)
  history_KP[:, :6] = history_5xD
  np.testing.assert_array_equal(SPACE.aggregate(history_KP), vector(d0=1, d3=0, d4=1))


def test_aggregate_without_a_clear_dimension_takes_the_farthest_ones():
  history_KP = np.full((12, 90), 0.5)
  history_KP[:2, 7] = 1  # mean 0.583
  history_KP[3:5, 40] = 0  # mean 0.417, as far
  history_KP[0, 8] = 0  # mean 0.458, nearer
  np.testing.assert_array_equal(SPACE.aggregate(history_KP), vector(d7=1, d40=0))


@pytest.mark.parametrize("history", [[], [vector()], [vector(d3=1), vector(d3=0)]])
def test_aggregate_of_nothing_or_a_draw_is_neutral(history):
  np.testing.assert_array_equal(SPACE.aggregate(history), vector())


@settings(deadline=None, max_examples=60)
@given(
  st.lists(st.lists(DIRECTIONS, min_size=6, max_size=6), min_size=1, max_size=10), st.randoms()
)
def test_aggregate_is_the_thresholded_exact_mean_in_any_order(history, random):
  history_KP = np.full((len(history), 90), 0.5)
  history_KP[:, :6] = history
  means = [sum(map(Fraction, column)) / len(history) for column in history_KP.T]
  expected = [
    1.0 if mean >= Fraction(6, 10) else 0.0 if mean < Fraction(4, 10) else 0.5 for mean in means
  ]
  farthest = max(abs(mean - Fraction(1, 2)) for mean in means)
  if set(expected) == {0.5} and farthest:
    expected = [
      float(mean > Fraction(1, 2)) if abs(mean - Fraction(1, 2)) == farthest else 0.5
      for mean in means
    ]
  order = list(range(len(history)))
  random.shuffle(order)
  np.testing.assert_array_equal(SPACE.aggregate(history_KP), expected)
  np.testing.assert_array_equal(SPACE.aggregate(history_KP[order]), expected)


def test_a_wrong_number_of_directions_is_refused():
  with pytest.raises(ValueError, match="89 directions for a space of 90"):
    SPACE.verbalise([1.0] * 89)


def test_a_history_of_the_wrong_width_is_refused():
  with pytest.raises(ValueError, match="89.*90"):
    SPACE.aggregate(np.ones((2, 89)))


def test_an_unknown_pole_is_refused_with_the_nearest_one():
  pole = SPACE.dimensions[89].positive
  misspelt = pole[:-2] + pole[-1]
  with pytest.raises(ValueError) as error:
    SPACE.parse(f"{SPACE.dimensions[0].positive}, {misspelt}")
  assert repr(misspelt) in str(error.value)
  assert f"Did you mean {pole!r}?" in str(error.value)


def test_a_pole_like_no_other_gets_no_hint():
  with pytest.raises(ValueError, match=r"'zzzzqqqq' is no pole of this preference space\.$"):
    SPACE.parse("zzzzqqqq")


@pytest.mark.parametrize(
  ("entries", "message"),
  [
    ([{"group": "g", "positive": "Likes tea"}], "dimension 0 has no 'negative'; add it"),
    (
      [
        {"group": "g", "positive": "Likes tea", "negative": "Dislikes tea"},
        {"group": "g", "positive": "Likes tea", "negative": "Hates tea"},
      ],
      "two poles have the same text; each must be unique",
    ),
  ],
)
def test_a_space_of_ones_own_is_checked(tmp_path, entries, message):
  path = tmp_path / "space.json"
  path.write_text(json.dumps(entries), encoding="utf-8")
  with pytest.raises(ValueError, match=message) as error:
    PreferenceSpace.from_json(path)
  assert str(path) in str(error.value)
