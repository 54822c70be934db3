"""Sampling: filters beside a sort in NumPy, frequencies beside probabilities."""

import jax
import numpy as np
import pytest

from alignx_jax.inference.sampling import (
  Settings,
  at_step,
  draw_tokens,
  filtered_log_probs,
  keys_of,
  sample,
)


def settings(rows, temperature=1.0, top_k=0, top_p=1.0):
  full = lambda x, dtype: np.full(rows, x, dtype)
  return Settings(full(temperature, np.float32), full(top_k, np.int32), full(top_p, np.float32))


def filtered_by_sorting(logits_V, temperature, top_k, top_p):
  """Probabilities [V], token by token from the most probable on."""
  if temperature == 0:
    return np.eye(len(logits_V))[np.argmax(logits_V)]
  scaled_V = logits_V.astype(np.float64) / temperature
  order = np.argsort(-scaled_V)[: top_k or None]
  probs = np.exp(scaled_V[order] - scaled_V.max())
  probs /= probs.sum()
  # A token is kept if those before it do not have the probability yet.
  kept = order[np.concatenate([[0.0], np.cumsum(probs)[:-1]]) < top_p]
  probs_V = np.zeros(len(logits_V))
  probs_V[kept] = np.exp(scaled_V[kept] - scaled_V.max())
  return probs_V / probs_V.sum()


def test_filters_are_those_of_a_sort_each_row_with_its_own_settings():
  rng = np.random.default_rng(0)
  rows = [
    (temperature, top_k, top_p)
    for temperature in (0.0, 0.3, 0.9, 2.0)
    for top_k in (0, 1, 3, 20, 500)
    for top_p in (0.01, 0.5, 0.9, 1.0)
  ]
  logits_BV = rng.normal(scale=3, size=(len(rows), 97)).astype(np.float32)
  columns = zip(*rows, strict=True)
  given = Settings(*(np.array(x, t) for x, t in zip(columns, ("f4", "i4", "f4"), strict=True)))
  found_BV = np.exp(jax.jit(filtered_log_probs)(logits_BV[:, None], given)[:, 0])
  for found_V, logits_V, row in zip(found_BV, logits_BV, rows, strict=True):
    np.testing.assert_allclose(found_V, filtered_by_sorting(logits_V, *row), atol=1e-6, err_msg=row)


def test_tokens_that_are_equally_probable_are_kept_together():
  logits = np.array([[2.0, 1.0, 1.0, 1.0, -np.inf]], np.float32)
  found = np.exp(filtered_log_probs(logits[:, None], settings(1, top_k=2))[0, 0])
  assert (found > 0).tolist() == [True, True, True, True, False]
  found = np.exp(filtered_log_probs(logits[:, None], settings(1, top_p=0.1))[0, 0])
  assert (found > 0).tolist() == [True, False, False, False, False]


@pytest.mark.parametrize("given", [{}, {"temperature": 0.7, "top_k": 4, "top_p": 0.8}])
def test_tokens_come_as_often_as_they_are_probable(given):
  logits_V = np.random.default_rng(0).normal(size=8).astype(np.float32)
  rows = 20_000
  keys_B = at_step(keys_of(np.arange(rows, dtype=np.uint32)), 5)
  logits_BV = np.broadcast_to(logits_V, (rows, 8))
  tokens_B = jax.jit(sample)(keys_B, logits_BV, settings(rows, **given))
  usual = {"temperature": 1.0, "top_k": 0, "top_p": 1.0}
  expected_V = filtered_by_sorting(logits_V, **usual | given)
  found_V = np.bincount(tokens_B, minlength=8) / rows
  assert 0.5 * np.abs(found_V - expected_V).sum() < 0.012  # 0.4 √(8 / 20,000) is usual


def test_a_stream_is_of_its_seed_and_step_alone():
  flat = np.zeros((3, 1000), np.float32)
  draw = lambda seeds, step: draw_tokens(at_step(keys_of(np.array(seeds, np.uint32)), step), flat)
  first, again, other = draw([1, 2, 3], 4), draw([3, 1, 1], 4), draw([1, 2, 3], 5)
  assert (again[1], again[2], again[0]) == (first[0], first[0], first[2])
  assert len({*first.tolist(), *other.tolist()}) == 6
