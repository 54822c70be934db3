"""Which history items a prompt shows."""

import itertools

import numpy as np
import pytest

from alignx_jax.personas.persona import (
  ComparedPair,
  HistoryPolicy,
  Persona,
  UserComment,
  sample_history,
)

RELEASE = HistoryPolicy("release")


def make_persona(comments=5, pairs=5):
  return Persona(
    tuple(UserComment(f"post {i}", f"comment {i}") for i in range(comments)),
    tuple(ComparedPair(f"post {i}", f"better {i}", f"worse {i}") for i in range(pairs)),
    "A gardener.",
  )


def test_release_draws_both_numbers_uniformly_and_independently():
  persona, rng, draws = make_persona(), np.random.default_rng(0), 5000
  # Of five each, the whole history is told from a draw of four and four.
  count = np.zeros((6, 6), int)
  for _ in range(draws):
    kept = sample_history(persona, RELEASE, rng)
    assert kept.comments == persona.comments[: len(kept.comments)]
    assert kept.pairs == persona.pairs[: len(kept.pairs)]
    assert kept.description == ""
    count[len(kept.comments), len(kept.pairs)] += 1
  expected = np.full((5, 5), draws / 25)
  expected[0, 0] = 0  # becomes all: 5 and 5
  np.testing.assert_array_equal(count[5, :5], 0)
  np.testing.assert_array_equal(count[:5, 5], 0)
  observed = np.append(count[:5, :5].ravel()[1:], count[5, 5])
  assert count[0, 0] == 0
  chi_square = np.sum((observed - draws / 25) ** 2) / (draws / 25)
  assert chi_square < 51.2  # 0.999 quantile at 24 degrees of freedom


def test_release_never_shows_an_empty_history_where_there_is_one():
  rng = np.random.default_rng(1)
  for comments, pairs in [(0, 4), (4, 0), (1, 0), (2, 3)]:
    persona = make_persona(comments, pairs)
    assert all(sample_history(persona, RELEASE, rng).history for _ in range(60))
  assert sample_history(make_persona(0, 0), RELEASE, rng) == Persona()


def test_all_shows_everything():
  persona = make_persona()
  assert sample_history(persona, HistoryPolicy(), np.random.default_rng(0)) == persona


@pytest.mark.parametrize("items", [0, 1, 3, 8, 10, 11])
def test_fixed_shows_so_many_items_in_the_order_kept(items):
  persona, rng, policy = make_persona(), np.random.default_rng(2), HistoryPolicy("fixed", items)
  seen = set()
  for _ in range(200):
    shown = sample_history(persona, policy, rng)
    assert len(shown.history) == min(items, 10)
    places = [persona.history.index(item) for item in shown.history]
    assert places == sorted(places)
    assert shown.description == "A gardener."
    seen |= set(places)
  assert seen == set(range(10) if items else ())


def test_kinds_say_what_is_shown_at_all():
  persona, rng = make_persona(2, 3), np.random.default_rng(3)
  for policy in ("release", "all", "fixed"):
    items = 5 if policy == "fixed" else 0
    shown = sample_history(persona, HistoryPolicy(policy, items, kinds=("pair",)), rng)
    assert (shown.comments, shown.description) == ((), "") and shown.pairs
  assert sample_history(persona, HistoryPolicy(kinds=("demo",)), rng) == Persona(
    description="A gardener."
  )
  assert sample_history(persona, HistoryPolicy(kinds=("ugc", "pair")), rng) == Persona(
    persona.comments, persona.pairs
  )


def test_order_changes_neither_items_nor_kinds():
  persona, rng = make_persona(), np.random.default_rng(4)
  turned = sample_history(persona, HistoryPolicy(order="reversed"), rng)
  assert turned == Persona(persona.comments[::-1], persona.pairs[::-1], "A gardener.")
  orders = set()
  for _ in range(50):
    shown = sample_history(persona, HistoryPolicy(order="shuffled"), rng)
    assert set(shown.comments) == set(persona.comments) and set(shown.pairs) == set(persona.pairs)
    orders.add(shown.comments)
  assert len(orders) > 20


@pytest.mark.parametrize(
  ("fields", "message"),
  [
    ({"policy": "newest"}, "history.policy is 'newest'; use release, all, fixed"),
    ({"kinds": ("ugc", "likes")}, "history.kinds is 'likes'; use ugc, pair, demo"),
    ({"order": "random"}, "history.order is 'random'; use kept, reversed, shuffled"),
    ({"policy": "fixed", "items": -1}, "history.items is -1"),
    ({"policy": "all", "items": 3}, "history.items is 3"),
  ],
)
def test_an_unknown_policy_is_refused(fields, message):
  with pytest.raises(ValueError, match=message):
    HistoryPolicy(**fields)


def test_what_is_drawn_is_what_differs_each_time():
  assert not HistoryPolicy().random and not HistoryPolicy(order="reversed").random
  assert all(
    p.random for p in (RELEASE, HistoryPolicy("fixed", 2), HistoryPolicy(order="shuffled"))
  )


def test_the_oldest_goes_first():
  persona = make_persona(2, 3)
  whole = persona.history
  assert whole == persona.comments + persona.pairs
  for dropped in itertools.count(1):
    persona = persona.drop_oldest()
    assert persona.history == whole[dropped:]
    assert persona.description == "A gardener."
    if not persona.history:
      break
  assert dropped == len(whole) == 5
  assert persona.drop_oldest() == persona


def test_the_oldest_is_the_last_where_the_newest_comes_first():
  persona = make_persona(2, 2)
  turned = sample_history(persona, HistoryPolicy(order="reversed"), np.random.default_rng(0))
  assert turned.drop_oldest(newest_first=True).comments == persona.comments[1:]
  without = Persona((), turned.pairs)
  assert without.drop_oldest(newest_first=True).pairs == persona.pairs[1:]
