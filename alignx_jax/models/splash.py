"""Attention over the packed row on TPU, by JAX's splash kernels.

The same arguments and results as attention.packed_attention, without its scores in
memory. Who sees whom is split in two: what is the same for every row (causal in the
layout, the rejected region blind to the chosen one) is a static mask, whose empty blocks
the kernels never visit; the examples of a row are segment ids, compared in the kernels,
so a block between two examples is computed and thrown away.

The backward pass has one kernel for dq and one for dk and dv. The single fused one saves
two of seven matrix products but writes a dq for each block of keys, L / block_kv times
the size of q, before it adds them up: a gigabyte for one row of 8,192 positions and 32
heads of 128, in blocks of 512.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
from jax.experimental.pallas.ops.tpu.splash_attention.splash_attention_mask import (
  Mask,
  MultiHeadMask,
)
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from alignx_jax.models.parallel import ROWS

# Name of the kernel's results for a checkpoint policy: to keep them saves to run it again.
SAVED = "attention"
LANES = 128  # Blocks are multiples of a TPU register's width.


@dataclasses.dataclass(frozen=True)
class PackedMask(Mask):
  """The static part of who sees whom, evaluated a block at a time and inside the kernels.

  The kernels compute a mask that has a `q_sequence` and a `mask_function` instead of
  loading it, and trace anew for a function that is not equal to the last one: the mask is
  its own function, equal and hashable by its fields.

  Attributes:
    chosen, rejected: where the two response regions begin in the layout; L if there are none.
    queries: rows of each context shard before padding, L / shards.
    padded: the same with padding, an even number if there are several shards.
    keys: L with padding.
    shards: context shards, each of which holds the rows that `pieces` deals to it.
  """

  chosen: int
  rejected: int
  queries: int
  padded: int
  keys: int
  shards: int = 1

  @property
  def shape(self) -> tuple[int, int]:
    return self.shards * self.padded, self.keys

  @functools.cached_property
  def q_sequence(self) -> np.ndarray:
    """Place in the layout of each row of queries, in the order the shards hold them."""
    rows_SL = np.arange(self.shards)[:, None] * self.queries + np.arange(self.padded)
    if self.shards > 1:
      rows_SL = rows_SL.reshape(2 * self.shards, -1)[pieces(self.shards)]
    return rows_SL.reshape(-1).astype(np.int32)

  @property
  def mask_function(self):
    return self

  def __call__(self, q_ids, kv_ids):
    """Whether a query sees a key; NumPy or JAX arrays of places in the layout."""
    sees = q_ids >= kv_ids
    if self.chosen < self.rejected:
      sees &= (q_ids < self.rejected) | (kv_ids < self.chosen) | (kv_ids >= self.rejected)
    return sees

  def __getitem__(self, index) -> np.ndarray:
    rows, columns = index
    return self(self.q_sequence[rows, None], np.arange(*columns.indices(self.keys), dtype=np.int32))


def splash_attention(
  q_BLHA,
  k_BLKA,
  v_BLKA,
  segments_BL,
  *,
  response: int,
  block_q: int = 512,
  block_kv: int = 512,
  interpret: bool = False,
):
  """What packed_attention computes, by TPU kernels.

  Any L will do: each kernel takes blocks between half the size asked for and all of it,
  multiples of 128, such that the least padding is needed. The padding is of segment 0, as
  the row's own: it sees only itself and nobody reads it. An L that is a multiple of the
  blocks asked for is not padded.

  Under `jax.set_mesh` the kernels run on each device's part: rows B split over "replica"
  and "fsdp", heads H and kv heads K over "tensor", queries L over "context", where every
  shard gathers the keys and values of the whole row. Axes the mesh lacks are not split.

  A causal mask gives the last context shard up to twice the mean work. So shards swap
  queries to hold an early and a late piece of the row each, and send the results back.
  That balances the causal mask; the rejected region, which skips the chosen one, leaves
  the busiest shard some 3 % above the mean. Segments are not looked at, and the keys and
  values of a whole row are held at once: no ring. Queries are not padded if L is a
  multiple of 2 · context · block_q.

  Args:
    q_BLHA, k_BLKA, v_BLKA: rotated queries and keys, and values; bfloat16 or float32.
    segments_BL: the example each position belongs to, 1, 2, …; 0 is padding.
    response: R, the size of each of the two response regions at the end of L.
    block_q, block_kv: the most queries and keys of a block, multiples of 128. Larger
      blocks are faster until they overflow the fast memory: 2,048 do on v5e and v5p.
    interpret: run the kernels in Python, on any backend; slow, for tests.
  Returns:
    Mixed values [B, L, H, A] in the type of q.
  Raises:
    ValueError: B, H, K or L does not divide by the mesh axes that split it, or a block
      is not a positive multiple of 128.
  """
  mesh = jax.sharding.get_abstract_mesh()
  B, L, H, A = q_BLHA.shape
  rows, heads, context = (
    tuple(axis for axis in axes if axis in mesh.shape) for axes in (ROWS, ("tensor",), ("context",))
  )
  _check_divides(mesh, rows, B, "rows")
  _check_divides(mesh, heads, H, "heads")
  _check_divides(mesh, heads, k_BLKA.shape[2], "kv heads")
  _check_divides(mesh, context, L, "positions of a row")
  shards = mesh.shape.get("context", 1)

  mask, sizes = plan(L, response, shards=shards, block_q=block_q, block_kv=block_kv)
  queries, keys = mask.queries, mask.keys
  kernel = splash.make_splash_mha(
    MultiHeadMask([mask] * H),
    head_shards=mesh.shape.get("tensor", 1),
    q_seq_shards=shards,
    block_sizes=sizes,
    interpret=interpret,
    residual_checkpoint_name=SAVED,
  )

  def attend(kernel, q_BLHA, k_BLKA, v_BLKA, segments_BL):
    """On one device's part."""
    seen = k_BLKA, v_BLKA, segments_BL
    if shards > 1:
      # Here rather than by a sharding: the gradients then come back by a reduce-scatter.
      seen = (jax.lax.all_gather(x, "context", axis=1, tiled=True) for x in seen)
    k_BLKA, v_BLKA, key_segments_BL = (_pad(x, keys) for x in seen)
    q_BLHA, segments_BL = (_pad(x, mask.padded) for x in (q_BLHA, segments_BL))
    if shards > 1:
      q_BLHA, segments_BL = (_deal(x, shards) for x in (q_BLHA, segments_BL))
    mixed_BHLA = jax.vmap(kernel)(
      (q_BLHA * A**-0.5).swapaxes(1, 2),
      k_BLKA.swapaxes(1, 2),
      v_BLKA.swapaxes(1, 2),
      splash.SegmentIds(segments_BL, key_segments_BL),
    )
    mixed_BLHA = mixed_BHLA.swapaxes(1, 2)
    if shards > 1:
      mixed_BLHA = _deal(mixed_BLHA, shards, back=True)
    return mixed_BLHA[:, :queries]

  if mesh.empty:
    return attend(kernel, q_BLHA, k_BLKA, v_BLKA, segments_BL)
  spec = P(rows, context, heads)
  kernel_spec = kernel.manual_sharding_spec(NamedSharding(mesh, P(heads, context)))
  # The kernels do not say over which axes their outputs vary, which the check asks for.
  return jax.shard_map(
    attend,
    in_specs=(kernel_spec, spec, spec, spec, P(rows, context)),
    out_specs=spec,
    check_vma=False,
  )(kernel, q_BLHA, k_BLKA, v_BLKA, segments_BL)


def plan(
  L: int, response: int, *, shards: int, block_q: int, block_kv: int
) -> tuple[PackedMask, splash.BlockSizes]:
  """What a row of L positions asks of the kernels: the mask of one head, and the blocks.

  Args:
    shards: context shards.
    block_q, block_kv: the most queries and keys of a block.
  """
  queries = L // shards
  # Blocks do not straddle the two pieces of a shard, which see different keys.
  halves = 1 if shards == 1 else 2
  block_q, piece = _blocks("block_q", block_q, -(-queries // halves))
  block_kv, keys = _blocks("block_kv", block_kv, L)
  mask = PackedMask(
    L - 2 * response, L - response, queries=queries, padded=piece * halves, keys=keys, shards=shards
  )
  sizes = splash.BlockSizes(
    block_q=block_q,
    block_kv=block_kv,
    block_q_dq=block_q,
    block_kv_dq=block_kv,
    block_q_dkv=block_q,
    block_kv_dkv=block_kv,
  )
  return mask, sizes


def pieces(shards: int) -> np.ndarray:
  """The two pieces of a row each context shard works on, of 2 · shards in order.

  Shard s takes pieces s and 2 · shards − 1 − s, an early one with a late one. One of the
  two is even, and comes first: [shards, 2].
  """
  early = np.arange(shards)
  late = 2 * shards - 1 - early
  return np.stack([np.where(early % 2, late, early), np.where(early % 2, early, late)], axis=1)


def _deal(x_BL, shards: int, *, back: bool = False):
  """Gives each context shard its two pieces, or takes them back; further axes may follow L.

  Shard s starts with pieces 2s and 2s + 1, so the even pieces are the first halves of all
  shards and the odd ones the second: two permutations of the shards.
  """
  moved = []
  for half, dealt in zip(jnp.split(x_BL, 2, axis=1), pieces(shards).T, strict=True):
    moves = [(piece // 2, shard) for shard, piece in enumerate(dealt.tolist())]
    moves = [move[::-1] for move in moves] if back else moves
    moved.append(jax.lax.ppermute(half, "context", moves))
  return jnp.concatenate(moved, axis=1)


def _blocks(name: str, most: int, length: int) -> tuple[int, int]:
  """The size of a block, and the length of a whole number of them that holds `length`.

  Of the sizes between half of `most` and all of it, the one with the least padding; of
  equals, the largest.
  """
  if most <= 0 or most % LANES:
    raise ValueError(f"{name} is {most}; it must be a positive multiple of {LANES}.")
  most = min(most, -(-length // LANES) * LANES)
  padded = {size: -(-length // size) * size for size in range(most, most // 2 - 1, -LANES)}
  size = min(padded, key=padded.get)
  return size, padded[size]


def _pad(x_BL, length: int):
  """Zeros at the end of axis L; further axes may follow it."""
  widths = [(0, 0), (0, length - x_BL.shape[1])] + [(0, 0)] * (x_BL.ndim - 2)
  return jnp.pad(x_BL, widths) if widths[1][1] else x_BL


def _check_divides(mesh, axes: tuple[str, ...], size: int, what: str):
  devices = math.prod(mesh.shape[axis] for axis in axes)
  if size % devices:
    raise ValueError(
      f"{size} {what} do not divide by the {devices} devices of mesh axis {' × '.join(axes)}."
    )
