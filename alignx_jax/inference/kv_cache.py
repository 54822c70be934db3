"""The decoder, reading a few tokens at a time: keys and values of what was read are kept.

The layers are the decoder's own (models/decoder.py), with an attention that writes to the
cache and looks at all of it. Training scans over layers, which would copy each layer's weights
and cache at every token; so here weights are kept apart by layer, and the loop is unrolled.

A cache has T slots for each row. What is read later stands in a later slot, and a token sees
the slots up to its own that hold something.
"""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from alignx_jax.models.attention import rotary_tables
from alignx_jax.models.decoder import Decoder, embed, rms_norm
from alignx_jax.models.parallel import ROWS, WIDTH, constrain
from alignx_jax.models.presets import Architecture
from alignx_jax.training import mesh as meshes

CHUNK = 256  # the most prompt tokens read at a time


class Cache(NamedTuple):
  """What was read.

  Attributes:
    keys: of each layer [B, K, A, T], rotated; transposed, since XLA's CPU backend multiplies
      them several times as fast so.
    values: of each layer [B, K, T, A].
    is_seen_BT: whether a slot holds something.
  """

  keys: tuple[jax.Array, ...]
  values: tuple[jax.Array, ...]
  is_seen_BT: jax.Array


class Weights(NamedTuple):
  """A decoder's parameters for reading token by token, in the compute type.

  Attributes:
    layers: of each layer, the state of models.decoder.Block.
    head_DV: transposed, for the same reason, so a copy even where it is tied.
  """

  embedding_VD: jax.Array
  layers: tuple[nnx.State, ...]
  final_norm_D: jax.Array
  head_DV: jax.Array


@dataclasses.dataclass(frozen=True)
class Reader:
  """What of a decoder is not a number; hashable.

  Attributes:
    graph: of models.decoder.Block.
    mesh: on which everything lies.
  """

  graph: nnx.GraphDef
  arch: Architecture
  dtype: jnp.dtype
  mesh: Mesh

  @classmethod
  def of(cls, model: Decoder, mesh: Mesh) -> "Reader":
    """Of a model, arrays or shapes alone.

    Raises:
      ValueError: the mesh splits positions, or more than there are key/value heads.
    """
    if mesh.shape["context"] > 1:
      raise ValueError(
        f"config.mesh.context is {mesh.shape['context']}; tokens come one by one and have no "
        "positions to split: set it to 1 for generation, and config.mesh.tensor higher."
      )
    if model.arch.kv_heads % mesh.shape["tensor"]:
      raise ValueError(
        f"config.mesh.tensor is {mesh.shape['tensor']}; the {model.arch.kv_heads} key/value heads "
        "do not divide by it: lower it."
      )
    return cls(nnx.graphdef(model.blocks), model.arch, model.compute_dtype, mesh)

  def weights(self, params: nnx.State) -> Weights:
    """Parameters apart by layer, a copy; a bridge's are left out."""
    stacked = params["blocks"]
    leaves, structure = jax.tree_util.tree_flatten_with_path(stacked)
    shardings = jax.tree.leaves(meshes.param_shardings({"blocks": stacked}, self.mesh))
    apart = [
      _apart(self.arch.layers, self.dtype, NamedSharding(self.mesh, P(*sharding.spec[1:])))(leaf)
      for (_, leaf), sharding in zip(leaves, shardings, strict=True)
    ]
    layers = [jax.tree.unflatten(structure, layer) for layer in zip(*apart, strict=True)]
    cast = lambda name: params[name][...].astype(self.dtype)
    embedding_VD = cast("embedding_VD")
    head_DV = _transposed(self.mesh)(embedding_VD if self.arch.tied else cast("head_VD"))
    return Weights(embedding_VD, tuple(layers), cast("final_norm_D"), head_DV)

  def empty(self, rows: int, slots: int) -> Cache:
    """A cache of nothing; under jit."""

    def make(*shape):
      zeros = lambda: jnp.zeros((rows, self.arch.kv_heads, *shape), self.dtype)
      return tuple(_on_mesh(zeros()) for _ in range(self.arch.layers))

    A = self.arch.head_width
    is_seen_BT = constrain(jnp.zeros((rows, slots), bool), ROWS, None)
    return Cache(make(A, slots), make(slots, A), is_seen_BT)

  def embed(self, weights: Weights, tokens_BS):
    """Embedded tokens [B, S, D]."""
    return embed(tokens_BS, weights.embedding_VD, self.dtype)

  def read(self, weights: Weights, cache: Cache, x_BSD, positions_BS, is_seen_BS, start):
    """Reads S embedded tokens.

    Args:
      is_seen_BS: whether anything may look at a token; padding is not seen.
      start: the slot of the first, the same for all rows, or of each [B]; never so late that
        a token has no slot.
    Returns:
      Final hidden states [B, S, D], and the cache with the tokens.
    """
    start = jnp.asarray(start)
    S, T = x_BSD.shape[1], cache.is_seen_BT.shape[1]
    is_seen_BT = _write(cache.is_seen_BT, is_seen_BS, start)
    slots_BS = start.reshape(-1, 1) + jnp.arange(S)
    mask_BST = is_seen_BT[:, None] & (slots_BS[..., None] >= jnp.arange(T))
    tables = rotary_tables(positions_BS, self.arch)
    x_BSD = constrain(x_BSD.astype(self.dtype), ROWS, None, None)
    keys, values = [], []
    for layer, k_BKAT, v_BKTA in zip(weights.layers, cache.keys, cache.values, strict=True):

      def attend(q_BSHA, k_BSKA, v_BSKA, segments, *, response, k_BKAT=k_BKAT, v_BKTA=v_BKTA):
        keys.append(_on_mesh(_write(k_BKAT, k_BSKA.transpose(0, 2, 3, 1), start, axis=3)))
        values.append(_on_mesh(_write(v_BKTA, v_BSKA.swapaxes(1, 2), start, axis=2)))
        return cached_attention(q_BSHA, keys[-1], values[-1], mask_BST)

      block = nnx.merge(self.graph, layer)
      x_BSD = block(
        x_BSD, arch=self.arch, attend=attend, tables=tables, segments_BL=None, response=0
      )
    hidden_BSD = rms_norm(x_BSD, weights.final_norm_D, self.arch.norm_epsilon)
    return hidden_BSD, Cache(tuple(keys), tuple(values), is_seen_BT)

  def read_prompt(self, weights, cache, tokens_BC, lengths_B, first_B, start: int) -> Cache:
    """Reads prompts, padded at their end, a chunk at a time as far as the longest goes.

    Args:
      lengths_B: tokens of each.
      first_B: position of each one's first.
      start: slot of the first.
    """
    B, C = tokens_BC.shape
    chunk = chunk_of(C)

    def read_chunk(carry):
      i, cache = carry
      tokens_BS = jax.lax.dynamic_slice(tokens_BC, (0, i * chunk), (B, chunk))
      index_S = i * chunk + jnp.arange(chunk)
      x_BSD = self.embed(weights, tokens_BS)
      is_seen_BS = index_S < lengths_B[:, None]
      positions_BS = first_B[:, None] + index_S
      args = x_BSD, positions_BS, is_seen_BS, start + i * chunk
      return i + 1, self.read(weights, cache, *args)[1]

    more = lambda carry: carry[0] * chunk < jnp.max(lengths_B)
    return jax.lax.while_loop(more, read_chunk, (jnp.int32(0), cache))[1]


def _on_mesh(cache_BKXX):
  return constrain(cache_BKXX, ROWS, "tensor", None, None)


@functools.cache
def _transposed(mesh: Mesh):
  return jax.jit(jnp.transpose, out_shardings=NamedSharding(mesh, P(WIDTH, "tensor")))


@functools.cache
def _apart(layers: int, dtype, sharding):
  return jax.jit(
    lambda x: tuple(x[i].astype(dtype) for i in range(layers)), out_shardings=(sharding,) * layers
  )


def chunk_of(size: int) -> int:
  """Tokens of a prompt region read at a time: the largest power of two that divides it, or all."""
  return size if size <= CHUNK else min(CHUNK, size & -size)


def bucket(size: int, least: int = 32) -> int:
  """The least of `least` · 1, 1.5, 2, 3, 4, 6, 8, … that holds so many."""
  while least < size:
    if 3 * least // 2 >= size:
      return 3 * least // 2
    least *= 2
  return least


def cached_attention(q_BSHA, k_BKAT, v_BKTA, mask_BST):
  """Softmax attention over a cache [B, S, H, A], float32 inside."""
  B, S, H, A = q_BSHA.shape
  K, T = v_BKTA.shape[1:3]
  q_BKGSA = (q_BSHA * A**-0.5).reshape(B, S, K, H // K, A).transpose(0, 2, 3, 1, 4)
  q_BKXA = q_BKGSA.reshape(B, K, -1, A)  # X = G · S
  score = jnp.matmul(q_BKXA, k_BKAT, preferred_element_type=jnp.float32)
  score = jnp.where(mask_BST[:, None, None], score.reshape(B, K, -1, S, T), -1e30)
  weight = jnp.exp(score - jnp.max(score, axis=-1, keepdims=True))
  total = jnp.sum(weight, axis=-1, keepdims=True)
  weight = weight.astype(v_BKTA.dtype).reshape(B, K, -1, T)
  mixed = jnp.matmul(weight, v_BKTA, preferred_element_type=jnp.float32)
  mixed_BKGSA = mixed.reshape(B, K, -1, S, A) / total
  return mixed_BKGSA.astype(q_BSHA.dtype).transpose(0, 3, 1, 2, 4).reshape(B, S, H, A)


def _write(old, new, start, axis: int = 1):
  """`new` in `old` from slot `start` of `axis` on, a scalar or [B]."""
  new = new.astype(old.dtype)
  if start.ndim == 0:
    return jax.lax.dynamic_update_slice_in_dim(old, new, start, axis)
  update = functools.partial(jax.lax.dynamic_update_slice_in_dim, axis=axis - 1)
  return jax.vmap(update)(old, new, start)
