"""Attention against the sentence that defines it, written out as one dense mask."""

import jax
import numpy as np
import pytest

from alignx_jax.models.attention import packed_attention


def _by_definition(q, k, v, segments, response):
  """Same segment, causal in the layout, and no key of the chosen region for the rejected."""
  B, L, H, A = q.shape
  k, v = (np.repeat(x, H // x.shape[2], axis=2) for x in (k, v))
  index = np.arange(L)
  region = (index >= L - 2 * response).astype(int) + (index >= L - response)
  mask = segments[:, :, None] == segments[:, None, :]
  mask &= index[:, None] >= index
  mask &= ~((region[:, None] == 2) & (region == 1))
  score = np.einsum("bsha,btha->bhst", q, k) / np.sqrt(A)
  weight = np.exp(score - score.max(-1, keepdims=True)) * mask[:, None]
  return np.einsum("bhst,btha->bsha", weight / weight.sum(-1, keepdims=True), v)


@pytest.mark.parametrize("response", [0, 12])
@pytest.mark.parametrize("block", [7, 16, 256])
def test_attention_is_what_the_definition_says(response, block):
  rng = np.random.default_rng(0)
  B, C, H, K, A = 2, 41, 4, 2, 8
  L = C + 2 * response
  q, k, v = (rng.normal(size=(B, L, n, A)).astype(np.float32) for n in (H, K, K))
  segments = np.sort(rng.integers(1, 4, size=(B, C)), axis=1)
  branches = [np.sort(rng.integers(1, 4, size=(B, response)), axis=1) for _ in range(2)]
  segments = np.concatenate([segments, *branches], axis=1)
  ours = jax.jit(packed_attention, static_argnames=("response", "block"))(
    q, k, v, segments, response=response, block=block
  )
  np.testing.assert_allclose(
    ours, _by_definition(q, k, v, segments, response), rtol=1e-5, atol=1e-5
  )
