"""Attention over the packed row, in two parts.

A row is laid out as [context region, C | chosen region, R | rejected region, R] and
holds several examples, told apart by segment id. The context attends to itself
causally; each response branch attends to its example's context and, causally, to
itself. The branches never meet, so the rejected one is blind to the chosen one.
A plain causal sequence is a row without response regions (R = 0).
"""

import functools
from typing import NamedTuple

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
  # Without the barrier XLA's CPU backend computes both anew wherever a head is rotated.
  return jax.lax.optimization_barrier((jnp.cos(angle_BLA), jnp.sin(angle_BLA)))


def rotate(x_BLHA, tables):
  """Applies rotary positions, the two halves of a head being the two coordinates."""
  cos_BL1A, sin_BL1A = (table[:, :, None, :] for table in tables)
  first, second = jnp.split(x_BLHA.astype(jnp.float32), 2, axis=-1)
  rotated = jnp.concatenate(
    [first * cos_BL1A - second * sin_BL1A, second * cos_BL1A + first * sin_BL1A], axis=-1
  )
  return rotated.astype(x_BLHA.dtype)


class Keys(NamedTuple):
  """Keys, values and the examples they belong to; with an axis N if each branch has its own.

  Attributes:
    k, v: [B, K, T, A] or [B, K, N, T, A].
    segments: [B, T] or [B, N, T].
  """

  k: jax.Array
  v: jax.Array
  segments: jax.Array


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
  mixed = []
  for start in range(0, C, block):
    end = min(start + block, C)
    before = Keys(k_BKLA[:, :, :end], v_BKLA[:, :, :end], seg_BC[:, :end])
    q_BKNGSA = q_BKGLA[:, :, None, :, start:end]  # N = 1
    mixed_BKNGSA = _attend((start,), q_BKNGSA, seg_BC[:, None, start:end], (before,))
    mixed.append(mixed_BKNGSA.reshape(B, H, end - start, A))
  if R:
    # Both branches at once: N is an axis, not two calls.
    branches = lambda x_BKLA: x_BKLA[:, :, C:].reshape(B, K, 2, R, A)
    seg_BNR = segments_BL[:, C:].reshape(B, 2, R)
    context = Keys(k_BKLA[:, :, :C], v_BKLA[:, :, :C], seg_BC)
    own = Keys(branches(k_BKLA), branches(v_BKLA), seg_BNR)
    q_BKNGRA = q_BKGLA[..., C:, :].reshape(B, K, H // K, 2, R, A).swapaxes(2, 3)
    mixed_BKNGRA = _attend((None, 0), q_BKNGRA, seg_BNR, (context, own))
    mixed.append(mixed_BKNGRA.swapaxes(2, 3).reshape(B, H, 2 * R, A))
  return jnp.concatenate(mixed, axis=2).swapaxes(1, 2)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(starts, q_BKNGSA, segments_BNS, groups):
  """Softmax attention of queries over groups of keys that are not laid side by side.

  The backward pass recomputes the weights from their logarithmic sums (Dao et al. 2022), so
  that nothing of the size of the scores is kept, and takes all products with the scores as
  the one side that is not transposed. Scores are float32 whatever the type.

  Args:
    starts: for each group, the position of the first query among its keys, each query seeing
      the keys up to itself; None where it sees all.
    q_BKNGSA: scaled queries of N branches, G heads for each of the K of the keys.
    segments_BNS: the example each query belongs to; each sees a key of some group.
    groups: Keys.
  Returns:
    Mixed values, like the queries.
  """
  return _forward(starts, q_BKNGSA, segments_BNS, groups)[0]


def _forward(starts, q_BKNGSA, segments_BNS, groups):
  scores = [
    _scores(q_BKNGSA, segments_BNS, keys, start) for start, keys in zip(starts, groups, strict=True)
  ]
  peaks = [jnp.max(jnp.where(mask, score, -1e30), axis=-1, keepdims=True) for score, mask in scores]
  peak = functools.reduce(jnp.maximum, peaks)
  weights = [jnp.where(mask, jnp.exp(score - peak), 0.0) for score, mask in scores]
  total = sum(jnp.sum(weight, axis=-1, keepdims=True) for weight in weights)
  dtype = q_BKNGSA.dtype
  pairs = zip(weights, groups, strict=True)
  # The weights are not divided, which would copy the largest arrays there are.
  mixed = sum(_product(weight.astype(dtype), keys.v) for weight, keys in pairs) / total
  mixed = mixed.astype(dtype)
  return mixed, (q_BKNGSA, segments_BNS, groups, mixed, peak + jnp.log(total))


def _backward(starts, saved, gradient):
  q_BKNGSA, segments_BNS, groups, mixed, log_total = saved
  of_total = gradient.astype(jnp.float32) * mixed.astype(jnp.float32)
  of_total = jnp.sum(of_total, axis=-1, keepdims=True)
  dtype = q_BKNGSA.dtype
  of_q, of_groups = 0.0, []
  for start, keys in zip(starts, groups, strict=True):
    score, mask = _scores(q_BKNGSA, segments_BNS, keys, start)
    weight = jnp.where(mask, jnp.exp(score - log_total), 0.0)
    of_score = weight * (_product(gradient, keys.v.swapaxes(-1, -2)) - of_total)
    of_score, weight = of_score.astype(dtype), weight.astype(dtype)
    of_q += _product(of_score, keys.k)
    of_keys = _transposed(q_BKNGSA, of_score, keys.k), _transposed(gradient, weight, keys.v)
    of_groups.append(Keys(*of_keys, None))
  return of_q.astype(dtype), None, tuple(of_groups)


_attend.defvjp(_forward, _backward)


def _scores(q_BKNGSA, segments_BNS, keys: Keys, start: int | None):
  """Scores [B, K, N, G, S, T] in float32, and a mask of their shape where they count."""
  score = _product(q_BKNGSA, keys.k.swapaxes(-1, -2))
  of_keys = keys.segments if keys.segments.ndim == 3 else keys.segments[:, None]
  mask_BNST = segments_BNS[..., None] == of_keys[..., None, :]
  if start is not None:
    S, T = mask_BNST.shape[-2:]
    mask_BNST &= jnp.arange(start, start + S)[:, None] >= jnp.arange(T)
  return score, mask_BNST[:, None, :, None]


def _product(x, y):
  """x [B, K, N, G, S, …] times y, whose leading axes are [B, K] or [B, K, N], in float32."""
  flat = x.reshape(*y.shape[:-2], -1, x.shape[-1])
  out = jnp.matmul(flat, y, preferred_element_type=jnp.float32)
  return out.reshape(*x.shape[:-1], y.shape[-1])


def _transposed(x, weight, like):
  """Σ over queries of weight [B, K, N, G, S, T] · x [B, K, N, G, S, A], shaped like keys.

  As (xᵀ · weight)ᵀ: to transpose the weights would copy them.
  """
  batch = like.shape[:-2]
  x = x.reshape(*batch, -1, x.shape[-1]).swapaxes(-1, -2)
  weight = weight.reshape(*batch, -1, weight.shape[-1])
  out = jnp.matmul(x, weight, preferred_element_type=jnp.float32)
  return out.swapaxes(-1, -2).astype(like.dtype)
