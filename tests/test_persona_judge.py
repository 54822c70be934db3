"""Persona-judge: exact with fixed roles; the roles; what it counts."""

import dataclasses
import itertools

import numpy as np
import pytest

from alignx_jax.inference.persona_judge import Judging, _after_accepted, judge, totals
from alignx_jax.inference.prompts import Prompt, Sampling
from tests.small_generators import (
  STOP,
  answers,
  recomputed_logits,
  small_generator,
  small_model,
  some_prompts,
)
from tests.test_sampling import filtered_by_sorting

PAPER = {"temperature": 0.9, "top_k": 20, "top_p": 0.9}


@pytest.fixture(scope="module")
def model():
  return small_model(preset="tiny", layers=1)


@pytest.fixture(scope="module")
def generator(model):
  return small_generator(model)


def judged(generator, pairs, judging):
  found = dict(judge(generator, pairs, judging))
  return [found[i] for i in range(len(pairs))]


def exact_distribution(model, ids, vocab: int, length: int) -> np.ndarray:
  """Probabilities [V^length] of all responses to a prompt, by the decoder as it is trained."""
  probs = {(): 1.0}
  for _ in range(length):
    step = {}
    for drawn, probability in probs.items():
      logits_V = recomputed_logits(model, [*ids, *drawn])[-1, :vocab]
      next_V = filtered_by_sorting(logits_V, *PAPER.values())
      step |= {(*drawn, token): probability * p for token, p in enumerate(next_V)}
    probs = step
  return np.array([probs[key] for key in itertools.product(range(vocab), repeat=length)])


def test_with_fixed_roles_responses_are_distributed_as_the_judges_own():
  vocab, length, count = 5, 3, 4096
  model = small_model(preset="tiny", layers=1, vocab_size=vocab + 3)
  generator = small_generator(model, vocab=vocab, stop_ids=(), rows=512)
  personas = np.random.default_rng(1).integers(vocab, size=(2, 20)).tolist()
  exact = [exact_distribution(model, ids, vocab, length) for ids in personas]
  apart = 0.5 * np.abs(exact[0] - exact[1]).sum()
  assert apart > 0.3

  def distances(judging):
    """Total variation of what comes out from judge-only sampling, of a sixteenth and of all."""
    pairs = [
      tuple(Prompt(ids, Sampling(**PAPER, max_new_tokens=length, seed=i), 0) for ids in personas)
      for i in range(count)
    ]
    codes = [
      np.dot(x.response.ids, vocab ** np.arange(length)[::-1])
      for x in judged(generator, pairs, judging)
    ]
    found = [np.bincount(codes[:n], minlength=vocab**length) / n for n in (count // 16, count)]
    return [0.5 * np.abs(x - exact[1]).sum() for x in found]

  few, many = distances(Judging(gamma=2, alternate=False))
  # As of draws from the very distribution: 0.4 Σ √(p / n) is usual.
  usual = 0.4 * np.sqrt(exact[1] / count).sum()
  assert many < 1.6 * usual < 0.06 and few > 2 * many


def greedy_rounds(model, personas, judging, most):
  """The greedy response by rounds of drafting and comparing, each token recomputed."""
  best = lambda side, drawn: int(np.argmax(recomputed_logits(model, [*personas[side], *drawn])[-1]))
  drawn, rounds = [], 0
  while len(drawn) < most and STOP not in drawn:
    drafter = rounds % 2 if judging.alternate else 0
    if judging.compat:
      drafter = min(rounds, 1)
    draft = []
    for _ in range(judging.gamma):
      draft.append(best(drafter, drawn + draft))
    for token in [*draft, None]:
      own = best(1 - drafter, drawn)
      is_rejected = token not in (None, own)
      # All of p is on one token and all of q on another: Σ (p − q) is 0, so the release draws
      # what it has rejected.
      drawn.append(token if is_rejected and judging.compat else own)
      if token is None or is_rejected:
        break
    rounds += 1
  drawn = drawn[:most]
  return drawn[: drawn.index(STOP) + 1] if STOP in drawn else drawn, rounds


@pytest.mark.parametrize(
  "judging", [Judging(3), Judging(3, alternate=False), Judging(3, compat="release")]
)
def test_greedy_responses_are_those_of_rounds_by_hand(model, generator, judging):
  prompts = some_prompts(4, low=10, high=30, max_new_tokens=10)
  # Prompts that differ a little agree now and then.
  others = [dataclasses.replace(p, ids=[p.ids[0] + 1, *p.ids[1:]]) for p in prompts]
  pairs = list(zip(prompts, others, strict=True))
  accepted = 0
  for pair, found in zip(pairs, judged(generator, pairs, judging), strict=True):
    expected, rounds = greedy_rounds(model, [x.ids for x in pair], judging, 10)
    assert found.response.ids + [STOP] * found.response.is_ended == expected
    assert found.passes == rounds * 4
    assert found.passes_per_token == rounds * 4 / len(expected)
    accepted += found.accepted
  assert accepted > 0


def test_a_persona_that_judges_itself_accepts_all(generator):
  prompts = some_prompts(3, temperature=1.0, max_new_tokens=24)
  all_found = judged(generator, [(p, p) for p in prompts], Judging(3))
  expected = {"responses": 3, "tokens": 72, "acceptance": 1.0, "passes_per_token": 1.0}
  assert totals(all_found) == expected
  for found in all_found:
    assert found.acceptance == 1.0
    assert not found.response.is_ended and found.passes_per_token == 1.0  # four for four


def test_a_response_depends_on_its_pair_and_seed_alone(generator):
  prompts = some_prompts(5, temperature=0.9, top_k=20, top_p=0.9)
  pairs = list(zip(prompts, prompts[1:] + prompts[:1], strict=True))
  together = judged(generator, pairs, Judging(3))
  assert [judged(generator, [pair], Judging(3))[0] for pair in pairs[:2]] == together[:2]


def test_a_judged_response_ends_where_the_judges_own_does(model, generator):
  prompts = some_prompts(2, low=20, max_new_tokens=12)
  (own,) = answers(generator, prompts[1:])
  stopping = small_generator(model, stop_ids=(own.ids[5],))
  (found,) = judged(stopping, [tuple(prompts)], Judging(4, alternate=False))
  (expected,) = answers(stopping, prompts[1:])
  assert found.response == expected and expected.is_ended


def test_after_a_rejection_the_release_may_draw_from_the_opposite():
  p, q = np.array([0.5, 0.25, 0.25, 0.0]), np.array([0.25, 0.5, 0.25, 0.0])
  logs = lambda x: np.log(np.maximum(x, 1e-30)).astype(np.float32)[None, None]
  both = np.concatenate([logs(p), logs(p)], axis=1)
  rejected, kept = np.array([0]), np.array([1])
  after = lambda accepted, judging: np.exp(
    np.asarray(_after_accepted(both, logs(q), accepted, judging))[0]
  )
  own = after(rejected, Judging(1))
  np.testing.assert_allclose(own / own.sum(), [1, 0, 0, 0], atol=1e-6)
  np.testing.assert_allclose(after(kept, Judging(1)), p, atol=1e-6)
  found = after(rejected, Judging(1, compat="release"))
  # Σ (p − q) is 0 here, as far as rounding goes.
  difference = np.exp(logs(p)[0, 0]) - np.exp(logs(q)[0, 0])
  expected = [0, 1, 0, 0] if difference.sum() <= 0 else [1, 0, 0, 0]
  np.testing.assert_allclose(found / found.sum(), expected, atol=1e-6)


def test_turns_that_make_no_sense_are_refused():
  for given, message in (
    ({"gamma": 0}, "gamma is 0"),
    ({"compat": "paper"}, "compat is 'paper'"),
    ({"compat": "release", "alternate": False}, "leave alternate"),
  ):
    with pytest.raises(ValueError, match=message):
      Judging(**given)
