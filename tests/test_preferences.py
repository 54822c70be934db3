"""Directions to profile text and back, against the AlignX release's own profiles."""

import dataclasses
import itertools
import json
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from alignx_jax.personas.preferences import Dimension, PreferenceSpace, alignx_space

SPACE = alignx_space()
TEA = Dimension("drinks", "Likes tea", "Dislikes tea")
CHESS = Dimension("games", "Likes chess", "Dislikes chess")
MINE = PreferenceSpace((*SPACE.dimensions, CHESS), "mine")
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
  message = "89 directions for the preference space 'alignx' of 90 dimensions; use the space"
  with pytest.raises(ValueError, match=message):
    SPACE.verbalise([1.0] * 89)


def test_a_history_of_the_wrong_width_is_refused():
  with pytest.raises(ValueError, match="89.*90"):
    SPACE.aggregate(np.ones((2, 89)))


def test_one_item_is_no_history():
  with pytest.raises(ValueError, match="1 directions .* 90"):
    SPACE.aggregate(np.ones(90))


def test_an_unknown_pole_is_refused_with_the_nearest_one():
  pole = SPACE.dimensions[89].positive
  misspelt = pole[:-2] + pole[-1]
  with pytest.raises(ValueError) as error:
    SPACE.parse(f"{SPACE.dimensions[0].positive}, {misspelt}")
  assert f"{misspelt!r} is no pole of the preference space 'alignx'." in str(error.value)
  assert f"Did you mean {pole!r}" in str(error.value)


def test_a_pole_like_no_other_gets_no_hint():
  with pytest.raises(
    ValueError, match=r"'zzzzqqqq' is no pole of the preference space 'alignx'\.$"
  ):
    SPACE.parse("zzzzqqqq")


def test_what_is_unknown_is_neither_said_nor_counted():
  unknown = np.nan
  history_KP = [vector(d0=1, d1=unknown, d2=unknown), vector(d0=unknown, d1=0, d2=unknown)]
  directions_P = SPACE.aggregate(history_KP)
  np.testing.assert_array_equal(directions_P, vector(d0=1, d1=0))
  assert SPACE.verbalise(vector(d0=1, d1=0, d2=unknown)) == SPACE.verbalise(directions_P)


def test_every_pole_is_found():
  for index, dimension in enumerate(SPACE.dimensions):
    assert SPACE.find(dimension.positive) == (index, 1.0)
    assert SPACE.find(dimension.negative) == (index, 0.0)


@pytest.mark.parametrize("name", ["Likes humour", "LIKES HUMOR", "humor"])
def test_what_is_not_found_gets_the_nearest_names(name):
  with pytest.raises(ValueError) as error:
    SPACE.find(name)
  message = f"{name!r} is no pole of the preference space 'alignx'. Did you mean 'Likes humor'"
  assert str(error.value).startswith(message)
  assert str(error.value).count("'") <= 4 + 2 * 3


# ------------------------------------------------------------------ a space of one's own


def written(tmp_path, content):
  path = tmp_path / "drinks.json"
  path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
  return path


def entry(**changes):
  return {"group": "drinks", "positive": "Likes tea", "negative": "Dislikes tea"} | changes


NO_SPACE = (
  'is no preference space; make it a list of one dimension or more, or an object of a "name"'
)
NO_TEXT = "make it text with no space at its ends"


@pytest.mark.parametrize(
  ("content", "message"),
  [
    ([], NO_SPACE),
    ({"name": "mine", "dimensions": []}, NO_SPACE),
    ({"name": "mine"}, NO_SPACE),
    ({"dimensions": [entry()]}, NO_SPACE),
    ({"name": " ", "dimensions": [entry()]}, NO_SPACE),
    ({"name": 3, "dimensions": [entry()]}, NO_SPACE),
    ({"name": "mine", "dimensions": {"0": entry()}}, NO_SPACE),
    (3, NO_SPACE),
    ("[{},]", "is not JSON"),
    ([entry(), "Likes tea"], "dimension 1 is a str; make it an object"),
    ([[entry()]], "dimension 0 is a list; make it an object"),
    ([{"group": "g", "positive": "Likes tea"}], "dimension 0 has no 'negative'; add it"),
    ([entry(positive=3)], f"dimension 0 has 3 as 'positive'; {NO_TEXT}"),
    ([entry(negative="")], f"dimension 0 has '' as 'negative'; {NO_TEXT}"),
    ([entry(negative=None)], f"dimension 0 has None as 'negative'; {NO_TEXT}"),
    ([entry(positive="Likes tea ")], f"dimension 0 has 'Likes tea ' as 'positive'; {NO_TEXT}"),
    ([entry(group=["g"])], f"dimension 0 has ['g'] as 'group'; {NO_TEXT}"),
    ([entry(formerly=3)], "dimension 0 has 3 as 'formerly'; make it a pole's text in an older"),
    (
      [entry(), entry(negative="Hates tea")],
      "two poles have the same text, 'Likes tea'; each must be unique",
    ),
    ([entry(negative="Likes tea")], "two poles have the same text, 'Likes tea'"),
  ],
)
def test_a_space_of_ones_own_is_checked(tmp_path, content, message):
  path = written(tmp_path, content)
  with pytest.raises(ValueError) as error:
    PreferenceSpace.from_json(path)
  assert str(error.value).startswith(str(path)) and message in str(error.value)


def test_a_space_has_the_name_it_gives_or_else_its_files(tmp_path):
  listed = PreferenceSpace.from_json(written(tmp_path, [entry()]))
  named = PreferenceSpace.from_json(written(tmp_path, {"name": "mine", "dimensions": [entry()]}))
  assert (listed.name, named.name, SPACE.name) == ("drinks", "mine", "alignx")
  assert listed.dimensions == named.dimensions == (TEA,)


@pytest.mark.parametrize(
  "space",
  [
    SPACE,
    PreferenceSpace((TEA, dataclasses.replace(CHESS, formerly="Likes Go — 囲碁")), "mine"),
  ],
)
def test_a_saved_space_is_read_as_it_was(tmp_path, space):
  read = PreferenceSpace.from_json(written(tmp_path, space.to_json()))
  assert dataclasses.asdict(read) == dataclasses.asdict(space)


def test_spaces_are_the_same_by_their_poles_in_order():
  renamed = tuple(Dimension("other", d.positive, d.negative, "x") for d in SPACE.dimensions)
  same = PreferenceSpace(renamed, "other")
  assert same == SPACE and hash(same) == hash(SPACE)
  same.check_same(SPACE, "The saved head")
  assert PreferenceSpace((TEA, CHESS)) != PreferenceSpace((CHESS, TEA))
  assert PreferenceSpace((TEA,)) != PreferenceSpace((Dimension("", "Dislikes tea", "Likes tea"),))


def test_what_is_keyed_by_a_space_does_not_depend_on_its_names():
  renamed = tuple(dataclasses.replace(d, formerly="x") for d in SPACE.dimensions)
  assert repr(PreferenceSpace(renamed, "other")) == repr(SPACE)


HATES_TEA = dataclasses.replace(TEA, negative="Hates tea")


@pytest.mark.parametrize(
  ("here", "there", "parts"),
  [
    (
      MINE,
      SPACE,
      (
        "The saved head is of the preference space 'alignx' (90 dimensions) and the one in use is "
        "'mine' (91)",
        "number 90, 'Likes chess' / 'Dislikes chess' here and nothing there",
      ),
    ),
    (
      SPACE,
      MINE,
      (
        "of the preference space 'mine' (91 dimensions) and the one in use is 'alignx' (90)",
        "number 90, nothing here and 'Likes chess' / 'Dislikes chess' there",
      ),
    ),
    (
      PreferenceSpace((CHESS, HATES_TEA)),
      PreferenceSpace((CHESS, TEA)),
      ("number 1, 'Likes tea' / 'Hates tea' here and 'Likes tea' / 'Dislikes tea' there",),
    ),
  ],
)
def test_what_is_of_another_space_is_refused_by_both_names(here, there, parts):
  with pytest.raises(ValueError) as error:
    here.check_same(there, "The saved head")
  for part in (*parts, "config.data.space", "PreferenceSpace.rows_from"):
    assert part in str(error.value)


# ------------------------------------------------------------------ from an older space


@settings(deadline=None, max_examples=40)
@given(
  st.permutations(range(91)), st.integers(1, 91), st.lists(DIRECTIONS, min_size=90, max_size=90)
)
def test_directions_follow_their_names_to_another_space(order, size, directions):
  new = PreferenceSpace(tuple(MINE.dimensions[i] for i in order[:size]), "new")
  rows_P = new.rows_from(SPACE)
  translated_P = new.translate(directions, SPACE)
  assert rows_P.shape == translated_P.shape == (size,) and rows_P.dtype.kind == "i"
  for dimension, row, direction in zip(new.dimensions, rows_P, translated_P, strict=True):
    if dimension == CHESS:
      assert row == -1 and np.isnan(direction)
    else:
      assert SPACE.dimensions[row] == dimension and direction == directions[row]
  # What both spaces have comes back as it was.
  back_P = SPACE.translate(translated_P, new)
  known_P = np.isin(np.arange(90), rows_P)
  np.testing.assert_array_equal(back_P, np.where(known_P, directions, np.nan))


def test_directions_of_many_items_are_translated_at_once():
  directions_KP = np.stack([vector(d0=1), vector(d89=0)]).astype(np.float32)
  translated_KP = MINE.translate(directions_KP[None], SPACE)
  assert translated_KP.shape == (1, 2, 91) and translated_KP.dtype == np.float32
  np.testing.assert_array_equal(translated_KP[0, :, :90], directions_KP)
  assert np.isnan(translated_KP[0, :, 90]).all()
  with pytest.raises(ValueError, match="91 directions for the preference space 'alignx' of 90"):
    MINE.translate(translated_KP, SPACE)


@pytest.mark.parametrize("formerly", ["Likes tea", "Dislikes tea"])
def test_a_renamed_dimension_is_known_by_either_old_pole(formerly):
  old = PreferenceSpace((CHESS, TEA), "old")
  new = PreferenceSpace((Dimension("drinks", "Drinks tea", "Drinks none", formerly), CHESS), "new")
  np.testing.assert_array_equal(new.rows_from(old), [1, 0])
  np.testing.assert_array_equal(new.translate([0.5, 0], old), [0, 0.5])
  # To itself, and to a space in which it had its new name already, it is no longer renamed.
  np.testing.assert_array_equal(new.rows_from(new), [0, 1])


@pytest.mark.parametrize(
  ("dimensions", "parts"),
  [
    (
      (Dimension("drinks", "Drinks tea", "Drinks none", "Like tea"),),
      (
        "'Drinks tea' of the preference space 'new'",
        "'Like tea' is no pole",
        "'old'",
        "'Likes tea'",
      ),
    ),
    (
      (
        Dimension("drinks", "Drinks tea", "Drinks none", "Likes tea"),
        Dimension("drinks", "Buys tea", "Buys none", "Dislikes tea"),
      ),
      ("'Buys tea'", "'Drinks tea' are both 'Likes tea' of 'old'", "only one can be"),
    ),
    (
      (TEA, Dimension("drinks", "Buys tea", "Buys none", "Dislikes tea")),
      ("'Buys tea'", "'Likes tea' are both 'Likes tea' of 'old'"),
    ),
    (
      (Dimension("drinks", "Dislikes tea", "Likes tea"),),
      ("'Dislikes tea' of", "its poles have changed places", "exchange them again"),
    ),
    (
      (Dimension("drinks", "Dislikes tea", "Drinks tea", "Likes tea"),),
      ("was 'Likes tea' / 'Dislikes tea' in 'old'", "its poles have changed places"),
    ),
  ],
)
def test_dimensions_that_cannot_be_told_by_name_are_refused(dimensions, parts):
  with pytest.raises(ValueError) as error:
    PreferenceSpace(dimensions, "new").rows_from(PreferenceSpace((TEA, CHESS), "old"))
  for part in parts:
    assert part in str(error.value)
