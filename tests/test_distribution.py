"""P̃ by hand: what it refuses, says and shows, and how a person steers it."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from alignx_jax.personas.distribution import Preferences
from alignx_jax.personas.preferences import Dimension, PreferenceSpace, alignx_space

SPACE = alignx_space()
SMALL = PreferenceSpace(
  tuple(Dimension("g", f"Likes {x}", f"Dislikes {x}") for x in ("tea", "chess", "humor", "rain")),
  "small",
)
# Negative, neutral, positive.
ROWS_PK = [[0.125, 0.25, 0.625], [0.75, 0.25, 0.0], [0.0, 1.0, 0.0], [0.25, 0.125, 0.625]]
DISTRIBUTIONS = st.lists(
  st.tuples(*[st.floats(0.01, 1)] * 3).map(lambda row: np.array(row) / sum(row)),
  min_size=4,
  max_size=4,
).map(lambda rows: Preferences(SMALL, np.array(rows)))
DIRECTIONS = st.sampled_from([0.0, 0.5, 1.0])


def small(**rows):
  """ROWS_PK but for rows given as r<index>=row."""
  return [rows.get(f"r{i}", row) for i, row in enumerate(ROWS_PK)]


@pytest.mark.parametrize(
  ("probabilities", "message"),
  [
    (np.ones((5, 3)) / 3, r"\(5, 3\).*'small' of 4 dimensions: give \(4, 3\)"),
    (np.ones((4, 2)) / 2, r"\(4, 2\).*\(negative, neutral, positive\)"),
    (np.ones((1, 4, 3)) / 3, r"\(1, 4, 3\).*'small'"),
    (small(r1=[np.nan, 0.5, 0.5]), "'Likes chess' are .*nan.*: each must be finite"),
    (small(r2=[0, np.inf, 0]), "'Likes humor' are .*inf.*: each must be finite"),
    (small(r3=[-0.5, 0.5, 1]), "'Likes rain' are .*-0.5.*not negative; give prob.*, not logits"),
    (small(r1=[0.5, 0.5, 0.5]), "'Likes chess' sum to 1.5: .* sum to 1; take the softmax"),
    (small(r0=[0, 0, 0.998]), "'Likes tea' sum to 0.998"),
    (small(r0=[0, 0, 0]), "'Likes tea' sum to 0:"),
  ],
)
def test_what_is_no_distribution_over_the_space_is_refused(probabilities, message):
  with pytest.raises(ValueError, match=message):
    Preferences(SMALL, probabilities)


def test_rows_are_normalised_in_a_copy_that_cannot_be_written():
  given_PK = np.array(ROWS_PK, np.float32)
  given_PK[1] *= 1.0009
  preferences = Preferences(SMALL, given_PK)
  np.testing.assert_allclose(preferences.probabilities_PK, ROWS_PK, rtol=1e-7)
  np.testing.assert_allclose(preferences.probabilities_PK.sum(axis=1), 1, rtol=1e-15)
  given_PK[:] = 0
  assert preferences["Likes tea"] == 0.625
  with pytest.raises(ValueError, match="read-only"):
    preferences.probabilities_PK[0] = 0


@settings(deadline=None, max_examples=40)
@given(st.lists(DIRECTIONS, min_size=90, max_size=90))
def test_directions_come_back(directions):
  preferences = Preferences.from_directions(SPACE, directions)
  np.testing.assert_array_equal(preferences.directions(), directions)
  assert preferences.verbalise() == SPACE.verbalise(directions)
  np.testing.assert_array_equal(preferences.probabilities_PK @ [0, 0.5, 1], directions)


def test_neutral_says_nothing():
  neutral = Preferences.neutral(SPACE)
  np.testing.assert_array_equal(neutral.probabilities_PK, np.tile([0.0, 1.0, 0.0], (90, 1)))
  assert (neutral.verbalise(), neutral.top(5)) == ("", [])
  assert str(neutral) == "neutral in all 90 dimensions"


@pytest.mark.parametrize("direction", [0.3, 2, np.nan])
def test_a_direction_of_another_value_is_refused(direction):
  with pytest.raises(ValueError, match=rf"'Likes humor' is {float(direction)}; use 0, 0.5 or 1"):
    Preferences.from_directions(SMALL, [1, 0, direction, 0.5])


def test_another_number_of_directions_is_refused():
  with pytest.raises(ValueError, match="5 directions for the preference space 'small' of 4"):
    Preferences.from_directions(SMALL, [1, 0, 0.5, 0.5, 1])


def test_a_probability_by_its_poles_text():
  preferences = Preferences(SMALL, ROWS_PK)
  assert (preferences["Likes tea"], preferences["Dislikes tea"]) == (0.625, 0.125)
  with pytest.raises(ValueError, match="'Likes tee' is no pole .*'small'.* mean 'Likes tea'"):
    preferences["Likes tee"]


# ------------------------------------------------------------------ steering


def test_steering_by_hand_worked_values():
  steered = Preferences(SMALL, ROWS_PK).with_preferences({"Likes humor": 1, "Dislikes tea": 0.5})
  np.testing.assert_allclose(
    steered.probabilities_PK,
    [[0.5625, 0.125, 0.3125], [0.75, 0.25, 0.0], [0.0, 0.0, 1.0], [0.25, 0.125, 0.625]],
    rtol=1e-15,
  )


@settings(deadline=None, max_examples=60)
@given(DISTRIBUTIONS, st.floats(0, 1), st.sampled_from([d.negative for d in SMALL.dimensions]))
def test_steering_moves_one_dimension_towards_its_pole(preferences, strength, pole):
  steered = preferences.with_preferences({pole: strength})
  index, _ = SMALL.find(pole)
  others = np.arange(4) != index
  before_PK, after_PK = preferences.probabilities_PK, steered.probabilities_PK
  assert after_PK[others].tobytes() == before_PK[others].tobytes()
  np.testing.assert_allclose(
    1 - steered[pole], (1 - strength) * (1 - preferences[pole]), atol=1e-14
  )
  np.testing.assert_allclose(after_PK.sum(axis=1), 1, atol=1e-14)


@settings(deadline=None, max_examples=40)
@given(DISTRIBUTIONS)
def test_no_strength_changes_no_bit_and_all_of_it_sets_the_pole(preferences):
  poles = [dimension.positive for dimension in SMALL.dimensions]
  before_PK = preferences.probabilities_PK
  same = preferences.with_preferences(dict.fromkeys(poles, 0))
  assert same.probabilities_PK.tobytes() == before_PK.tobytes()
  assert preferences.with_preferences({}).probabilities_PK.tobytes() == before_PK.tobytes()
  certain = preferences.with_preferences(dict.fromkeys(poles, 1.0))
  np.testing.assert_array_equal(certain.probabilities_PK, np.tile([0.0, 0.0, 1.0], (4, 1)))


def test_steering_leaves_the_inferred_preferences_be():
  preferences = Preferences(SMALL, ROWS_PK)
  preferences.with_preferences({"Likes rain": 1.0})
  np.testing.assert_array_equal(preferences.probabilities_PK, ROWS_PK)


@pytest.mark.parametrize("strength", [-0.1, 1.01, np.nan, np.inf, "1", None, True])
def test_a_strength_that_is_no_share_is_refused(strength):
  with pytest.raises(ValueError) as error:
    Preferences(SMALL, ROWS_PK).with_preferences({"Likes tea": strength})
  assert f"The strength of 'Likes tea' is {strength!r}; give a number from 0" in str(error.value)


def test_an_unknown_pole_is_refused_with_the_nearest():
  with pytest.raises(ValueError, match="'Likes humour' is no pole .*Did you mean 'Likes humor'"):
    Preferences.neutral(SPACE).with_preferences({"Likes humour": 1.0})


def test_both_poles_of_a_dimension_are_refused():
  with pytest.raises(ValueError, match="'Likes tea' and 'Dislikes tea' are poles of one dim.*keep"):
    Preferences.neutral(SMALL).with_preferences({"Likes tea": 0.1, "Dislikes tea": 0})


# ------------------------------------------------------------------ what it says and shows


def test_top_is_the_most_probable_first_and_ties_by_index():
  preferences = Preferences(SMALL, small(r2=[0.25, 0.5, 0.25]))
  expected = [
    ("Dislikes chess", 0.75),
    ("Likes tea", 0.625),
    ("Likes rain", 0.625),
    ("Likes humor", 0.25),
    ("Dislikes humor", 0.25),
    ("Dislikes rain", 0.25),
    ("Dislikes tea", 0.125),
  ]
  assert preferences.top(100) == expected
  assert preferences.top(3) == expected[:3]


@pytest.mark.parametrize(
  ("threshold", "expected"),
  [
    (0.5, [1, 0, 0.5, 1]),
    (0.625, [1, 0, 0.5, 1]),  # reached
    (0.7, [0.5, 0, 0.5, 0.5]),
    (0.8, [0.5, 0.5, 0.5, 0.5]),
  ],
)
def test_directions_are_the_poles_that_reach_the_threshold(threshold, expected):
  preferences = Preferences(SMALL, ROWS_PK)
  np.testing.assert_array_equal(preferences.directions(threshold), expected)
  assert preferences.verbalise(threshold) == SMALL.verbalise(expected)


def test_a_pole_must_be_above_the_other_one():
  draw = Preferences(SMALL, small(r0=[0.5, 0, 0.5], r1=[0.45, 0.15, 0.4]))
  np.testing.assert_array_equal(draw.directions(0.4), [0.5, 0, 0.5, 1])


def test_the_dictionary_is_named_and_is_json():
  named = Preferences(SMALL, ROWS_PK).as_dict()
  assert list(named) == [dimension.positive for dimension in SMALL.dimensions]
  assert named["Likes chess"] == {"negative": 0.75, "neutral": 0.25, "positive": 0.0}
  rows_PK = [list(row.values()) for row in json.loads(json.dumps(named)).values()]
  np.testing.assert_array_equal(rows_PK, ROWS_PK)


def test_a_notebook_shows_the_top_ten_as_aligned_lines():
  preferences = Preferences(SMALL, small(r3=[1, 0, 0]))
  assert str(preferences) == repr(preferences)
  assert str(preferences).splitlines() == [
    "Dislikes rain   100.0 %",
    "Dislikes chess   75.0 %",
    "Likes tea        62.5 %",
    "Dislikes tea     12.5 %",
  ]
  lines = str(Preferences.from_directions(SPACE, [1.0] * 90)).splitlines()
  assert len(lines) == 10 and len({len(line) for line in lines}) == 1
