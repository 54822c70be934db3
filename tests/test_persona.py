"""Which history items a prompt shows."""

import itertools

import numpy as np
import pytest

from alignx_jax.personas.persona import ComparedPair, Persona, UserComment, sample_history


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
    kept = sample_history(persona, "release", rng)
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
    assert all(sample_history(persona, "release", rng).history for _ in range(60))
  assert sample_history(make_persona(0, 0), "release", rng) == Persona()


def test_all_shows_everything():
  persona = make_persona()
  assert sample_history(persona, "all", np.random.default_rng(0)) == persona


def test_an_unknown_policy_is_refused():
  with pytest.raises(ValueError, match="'newest'.*release, all"):
    sample_history(make_persona(), "newest", np.random.default_rng(0))


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
