"""Low-rank adaptation (LoRA, Hu et al. 2022): W + (alpha / rank) · A B beside frozen weights.

The factors are parameters of the decoder's blocks, of a type of their own: NAME_lora_a and
NAME_lora_b beside the projection NAME. B starts at zero, so the adapted model starts as the
base; and the base is the adapted model with its B at zero, so no second copy is needed.
"""

import math

import jax
import jax.numpy as jnp
from flax import nnx

from alignx_jax.models.bridge import BridgeParam

# Each projection and how many of its axes, after that of the layers, are inputs.
PROJECTIONS = {
  "q_DHA": 1,
  "k_DKA": 1,
  "v_DKA": 1,
  "o_HAD": 2,
  "gate_DF": 1,
  "up_DF": 1,
  "down_FD": 1,
}


class LoraParam(nnx.Param):
  """A factor of an adapter: what is trained when there is one."""


def add_lora(model, *, rank: int, alpha: float, rngs: nnx.Rngs) -> None:
  """Adds factors to every projection of a Decoder: A [layers, in, rank], B [layers, rank, out].

  Raises:
    ValueError: the rank is not positive.
  """
  if rank < 1:
    raise ValueError(f"config.lora.rank is {rank}; set it to 1 or more, or to 0 for none.")
  blocks = model.blocks
  blocks.lora_scale = alpha / rank
  for name, inputs in PROJECTIONS.items():
    weight = getattr(blocks, name)
    layers, *shape = weight.shape
    size_in, size_out = math.prod(shape[:inputs]), math.prod(shape[inputs:])
    # The factors are small and stay float32, whatever the base is stored in.
    a = jax.random.normal(rngs.params(), (layers, size_in, rank), jnp.float32) / size_in**0.5
    setattr(blocks, f"{name}_lora_a", LoraParam(a))
    setattr(blocks, f"{name}_lora_b", LoraParam(jnp.zeros((layers, rank, size_out), jnp.float32)))


def split_trainable(
  params: nnx.State, *, bridge_alone: bool = False
) -> tuple[nnx.State, nnx.State]:
  """(what is trained, what is frozen): factors and bridge if there are factors, else all.

  Args:
    bridge_alone: train the bridge and nothing else.
  """
  if bridge_alone:
    return tuple(nnx.split_state(params, BridgeParam, ...))
  if not jax.tree.leaves(nnx.split_state(params, LoraParam, ...)[0]):
    return params, nnx.State({})
  return tuple(nnx.split_state(params, (LoraParam, BridgeParam), ...))


def without_lora(params: nnx.State) -> nnx.State:
  """The same parameters with every B at zero: the base."""

  def zero(path, leaf):
    return jnp.zeros_like(leaf) if "_lora_b" in jax.tree_util.keystr(path) else leaf

  return jax.tree_util.tree_map_with_path(zero, params)


def _merged(weight, a, b, *, scale: float):
  """W + scale · A B, split over devices as W is."""

  def add(weight, a, b):
    change = scale * jnp.einsum("xir,xro->xio", a, b).reshape(weight.shape)
    return (weight.astype(jnp.float32) + change).astype(weight.dtype)

  return jax.jit(add, out_shardings=weight.sharding, donate_argnums=0)(weight, a, b)


def merge_lora(model) -> None:
  """Adds the adapters into the projections' weights and removes them."""
  blocks = model.blocks
  if not hasattr(blocks, "lora_scale"):
    return
  for name in PROJECTIONS:
    weight = getattr(blocks, name)
    a, b = (getattr(blocks, f"{name}_lora_{factor}")[...] for factor in "ab")
    merged = _merged(weight[...], a, b, scale=blocks.lora_scale)
    setattr(blocks, name, nnx.Param(merged))
    delattr(blocks, f"{name}_lora_a")
    delattr(blocks, f"{name}_lora_b")
  del blocks.lora_scale


def merged_base(model, params: nnx.State) -> nnx.State:
  """The parameters of a plain decoder that does as one with an adapter, whatever its bridge.

  Args:
    model: shapes alone.
    params: of it; weights that an adapter is merged into are given away.
  """
  model = nnx.merge(nnx.graphdef(model), params)
  merge_lora(model)
  return nnx.split_state(nnx.state(model), BridgeParam, ...)[1]
