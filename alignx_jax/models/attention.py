"""Attention over the packed row, in two parts.

A row is laid out as [context region, C | chosen region, R | rejected region, R] and
holds several examples, told apart by segment id. The context attends to itself
causally; each response branch attends to its example's context and, causally, to
itself. The branches never meet, so the rejected one is blind to the chosen one.
A plain causal sequence is a row without response regions (R = 0).
"""

import functools

import jax
import jax.numpy as jnp

from alignx_jax.models.parallel import ROWS, axis_size, constrain


def rotary_tables(positions_BL, architecture):
  """Cosine and sine of the rotary angles, float32 [B, L, A/2].

  Frequencies follow Su et al. 2021; `rope_scaling` stretches the low ones as Llama 3.1
  does: wavelengths beyond original_max_positions / low_freq_factor are multiplied by
  `factor`, short ones kept, and those between interpolated.
  """
  half = architecture.head_width // 2
  frequency_A = architecture.rope_theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
  if (scaling := architecture.rope_scaling) is not None:
    turns_A = scaling.original_max_positions * frequency_A / (2 * jnp.pi)
    kept_A = (turns_A - scaling.low_freq_factor) / (
      scaling.high_freq_factor - scaling.low_freq_factor
    )
    kept_A = jnp.clip(kept_A, 0.0, 1.0)
    frequency_A = frequency_A * (kept_A + (1 - kept_A) / scaling.factor)
  angle_BLA = positions_BL[..., None].astype(jnp.float32) * frequency_A
  return jnp.cos(angle_BLA), jnp.sin(angle_BLA)


def rotate(x_BLHA, tables):
  """Applies rotary positions, the two halves of a head being the two coordinates."""
  cos_BL1A, sin_BL1A = (table[:, :, None, :] for table in tables)
  first, second = jnp.split(x_BLHA.astype(jnp.float32), 2, axis=-1)
  rotated = jnp.concatenate(
    [first * cos_BL1A - second * sin_BL1A, second * cos_BL1A + first * sin_BL1A], axis=-1
  )
  return rotated.astype(x_BLHA.dtype)


def packed_attention(q_BLHA, k_BLKA, v_BLKA, segments_BL, *, response: int, block: int = 256):
  """Two-part attention; see the module's docstring for who sees whom.

  Args:
    q_BLHA, k_BLKA, v_BLKA: rotated queries and keys, and values.
    segments_BL: the example each position belongs to, 1, 2, …; 0 is padding.
    response: R, the size of each of the two response regions at the end of L.
    block: context queries taken at a time. No block scores the keys that come after it,
      which saves near half of the products; at most eight blocks, whatever C.
  Returns:
    Mixed values [B, L, H, A].
  """
  if axis_size("context") > 1:
    # Each device of the axis computes whole rows: right, but only the kernel saves by it.
    gather = lambda x: constrain(x, ROWS, None, "tensor", None)
    q_BLHA, k_BLKA, v_BLKA = gather(q_BLHA), gather(k_BLKA), gather(v_BLKA)
  B, L, H, A = q_BLHA.shape
  K = k_BLKA.shape[2]
  C, R = L - 2 * response, response
  # Heads before positions, so that every product below is a batched matrix product
  # without a transpose of its own.
  q_BKGLA = (q_BLHA * A**-0.5).reshape(B, L, K, H // K, A).transpose(0, 2, 3, 1, 4)
  k_BKLA, v_BKLA = k_BLKA.swapaxes(1, 2), v_BLKA.swapaxes(1, 2)

  seg_BC = segments_BL[:, :C]
  block = max(block, -(-C // 8))
  blocks = []
  for start in range(0, C, block):
    end = min(start + block, C)
    same_BST = seg_BC[:, start:end, None] == seg_BC[:, None, :end]
    mask_BST = same_BST & (jnp.arange(start, end)[:, None] >= jnp.arange(end))
    score = jnp.einsum("bkgsa,bkta->bkgst", q_BKGLA[..., start:end, :], k_BKLA[:, :, :end])
    (weight,), total = _exponentials((score, mask_BST[:, None, None]))
    blocks.append(jnp.einsum("bkgst,bkta->bkgsa", weight, v_BKLA[:, :, :end]) / total)
  if R:
    # Both branches at once: N is an axis, not two calls.
    q_BKGNRA = q_BKGLA[..., C:, :].reshape(B, K, H // K, 2, R, A)
    k_BKNRA = k_BKLA[:, :, C:].reshape(B, K, 2, R, A)
    v_BKNRA = v_BKLA[:, :, C:].reshape(B, K, 2, R, A)
    seg_BNR = segments_BL[:, C:].reshape(B, 2, R)
    to_context = jnp.einsum("bkgnra,bkta->bkgnrt", q_BKGNRA, k_BKLA[:, :, :C])
    to_self = jnp.einsum("bkgnra,bknta->bkgnrt", q_BKGNRA, k_BKNRA)
    context_mask = seg_BNR[..., None] == seg_BC[:, None, None, :]
    causal_RR = jnp.arange(R)[:, None] >= jnp.arange(R)
    self_mask = (seg_BNR[..., :, None] == seg_BNR[..., None, :]) & causal_RR
    (on_context, on_self), total = _exponentials(
      (to_context, context_mask[:, None, None]), (to_self, self_mask[:, None, None])
    )
    branches = jnp.einsum("bkgnrt,bkta->bkgnra", on_context, v_BKLA[:, :, :C])
    branches += jnp.einsum("bkgnrt,bknta->bkgnra", on_self, v_BKNRA)
    blocks.append((branches / total).reshape(B, K, H // K, 2 * R, A))
  mixed = jnp.concatenate(blocks, axis=3).astype(q_BLHA.dtype)
  return mixed.transpose(0, 3, 1, 2, 4).reshape(B, L, H, A)


def _exponentials(*scores_and_masks):
  """A masked softmax over several groups of keys, before its division.

  The groups are not laid side by side and the weights not divided, which would copy the
  largest arrays there are; divide what the weights mixed. In float32 whatever the type.

  Args:
    scores_and_masks: pairs of [..., keys]; each query sees a key of some group.
  Returns:
    The weights of each group in the scores' type, and their float32 sum [..., 1] over all.
  """
  masked = [jnp.where(mask, score.astype(jnp.float32), -1e30) for score, mask in scores_and_masks]
  peaks = [jnp.max(score, axis=-1, keepdims=True) for score in masked]
  peak = jax.lax.stop_gradient(functools.reduce(jnp.maximum, peaks))
  weights = [jnp.exp(score - peak) for score in masked]
  dtype = scores_and_masks[0][0].dtype
  total = sum(jnp.sum(weight, axis=-1, keepdims=True) for weight in weights)
  return [weight.astype(dtype) for weight in weights], total
