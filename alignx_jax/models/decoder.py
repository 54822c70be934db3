"""The Llama-family decoder: tokens to hidden states. The head is applied elsewhere."""

import functools
import math

import jax
import jax.numpy as jnp
from flax import nnx

from alignx_jax.models.attention import packed_attention, rotary_tables, rotate
from alignx_jax.models.parallel import ROWS, WIDTH, axis_size, constrain
from alignx_jax.models.presets import Architecture
from alignx_jax.models.splash import SAVED, splash_attention


class Block(nnx.Module):
  """All layers at once: every parameter has a leading axis of layers, which is scanned."""

  def __init__(self, arch: Architecture, *, param_dtype, rngs: nnx.Rngs):
    D, H, K, A, F = arch.width, arch.heads, arch.kv_heads, arch.head_width, arch.feed_forward

    def normal(*shape, scale=0.02):
      value = scale * jax.random.normal(rngs.params(), (arch.layers, *shape), jnp.float32)
      return nnx.Param(value.astype(param_dtype))

    def constant(value, *shape):
      return nnx.Param(jnp.full((arch.layers, *shape), value, param_dtype))

    # Residual outputs start smaller so that the stream's variance does not grow with depth.
    out_scale = 0.02 / (2 * arch.layers) ** 0.5
    self.attention_norm_D = constant(1, D)
    self.q_DHA = normal(D, H, A)
    self.k_DKA = normal(D, K, A)
    self.v_DKA = normal(D, K, A)
    if arch.attention_bias:
      self.q_bias_HA = constant(0, H, A)
      self.k_bias_KA = constant(0, K, A)
      self.v_bias_KA = constant(0, K, A)
    self.o_HAD = normal(H, A, D, scale=out_scale)
    self.mlp_norm_D = constant(1, D)
    self.gate_DF = normal(D, F)
    self.up_DF = normal(D, F)
    self.down_FD = normal(F, D, scale=out_scale)

  def __call__(self, x_BLD, *, arch: Architecture, attend, tables, segments_BL, response: int):
    """One layer (the leading axis scanned away): [B, L, D] to [B, L, D].

    Args:
      attend: packed_attention or what computes the same.
    """

    def weight(name):
      return getattr(self, name)[...].astype(x_BLD.dtype)

    def linear(x, name, inputs=1):
      y = project(x, weight(name), inputs=inputs)
      if hasattr(self, "lora_scale"):
        low = project(x.reshape(*x.shape[:2], -1), weight(f"{name}_lora_a"))
        change = project(low, weight(f"{name}_lora_b")).reshape(y.shape)
        y += jnp.asarray(self.lora_scale, y.dtype) * change
      return y

    def heads(x, name, bias):
      y = linear(x, name) + (weight(bias) if arch.attention_bias else 0)
      return constrain(y, ROWS, "context", "tensor", None)

    normed = rms_norm(x_BLD, self.attention_norm_D[...], arch.norm_epsilon)
    mixed_BLHA = attend(
      rotate(heads(normed, "q_DHA", "q_bias_HA"), tables),
      rotate(heads(normed, "k_DKA", "k_bias_KA"), tables),
      heads(normed, "v_DKA", "v_bias_KA"),
      segments_BL,
      response=response,
    )
    mixed_BLHA = constrain(mixed_BLHA, ROWS, "context", "tensor", None)
    x_BLD = constrain(x_BLD + linear(mixed_BLHA, "o_HAD", inputs=2), ROWS, "context", None)
    normed = rms_norm(x_BLD, self.mlp_norm_D[...], arch.norm_epsilon)
    gated_BLF = jax.nn.silu(linear(normed, "gate_DF")) * linear(normed, "up_DF")
    gated_BLF = constrain(gated_BLF, ROWS, "context", "tensor")
    return constrain(x_BLD + linear(gated_BLF, "down_FD"), ROWS, "context", None)


class Decoder(nnx.Module):
  """Token ids to final hidden states.

  Attributes:
    embedding_VD: the embedding table, also the head when `arch.tied`.
    head_VD: the untied head, absent when tied; read the head through `head`.
    attention: "dense" (models/attention.py) or "splash", the TPU kernel.
    block: query and key positions that the kernel takes at a time.
  """

  def __init__(
    self,
    arch: Architecture,
    *,
    rngs: nnx.Rngs,
    param_dtype=jnp.float32,
    compute_dtype=jnp.float32,
    remat: bool = True,
    attention: str = "dense",
    block: int = 1024,
  ):
    if attention not in ("dense", "splash"):
      raise ValueError(f"No attention {attention!r}; config.model.attention is dense or splash.")
    self.arch = arch
    self.attention, self.block = attention, block
    self.compute_dtype = jnp.dtype(compute_dtype)
    self.remat = remat

    def table():
      value = 0.02 * jax.random.normal(rngs.params(), (arch.vocab_size, arch.width), jnp.float32)
      return nnx.Param(value.astype(param_dtype))

    self.embedding_VD = table()
    self.blocks = Block(arch, param_dtype=param_dtype, rngs=rngs)
    self.final_norm_D = nnx.Param(jnp.ones((arch.width,), param_dtype))
    if not arch.tied:
      self.head_VD = table()

  @property
  def head(self):
    """The head's weights [V, D] in the type they are stored in."""
    return (self.embedding_VD if self.arch.tied else self.head_VD)[...]

  def __call__(
    self,
    tokens_BL,
    positions_BL,
    segments_BL,
    *,
    response: int = 0,
    bridge_BTD=None,
    moved_BLD=None,
  ):
    """Final hidden states [B, L, D], normalised, in the compute type.

    Args:
      tokens_BL: token ids.
      positions_BL: rotary position of each token within its example.
      segments_BL: the example each token belongs to; 0 is padding.
      response: R, the size of the two response regions at the row's end; 0 for a plain
        causal sequence.
      bridge_BTD: vectors that stand before the row as embedded tokens do; positions and
        segments count them, and so do the states that come back.
      moved_BLD: what is added to the embedded tokens.
    """
    x_BLD = embed(tokens_BL, self.embedding_VD[...], self.compute_dtype)
    if moved_BLD is not None:
      moved_BLD = constrain(moved_BLD.astype(self.compute_dtype), ROWS, "context", None)
      x_BLD = constrain(x_BLD + moved_BLD, ROWS, "context", None)
    if bridge_BTD is not None:
      bridge_BTD = constrain(bridge_BTD.astype(self.compute_dtype), ROWS, None, None)
      x_BLD = jnp.concatenate([bridge_BTD, x_BLD], axis=1)
      x_BLD = constrain(x_BLD, ROWS, "context", None)
    graph, layers = nnx.split(self.blocks)
    # Cast before the scan gathers them: half the bytes to send.
    layers = jax.tree.map(lambda x: x.astype(self.compute_dtype), layers)
    attend = packed_attention
    if self.attention == "splash":
      attend = functools.partial(splash_attention, block_q=self.block, block_kv=self.block)
    apply = functools.partial(
      _apply_layer,
      graph,
      arch=self.arch,
      attend=attend,
      tables=rotary_tables(positions_BL, self.arch),
      segments_BL=segments_BL,
      response=response,
    )
    if self.remat:
      policy = jax.checkpoint_policies.save_only_these_names(SAVED)
      apply = jax.checkpoint(apply, policy=policy)
    # A loop costs XLA's CPU backend a fifth of a shallow model's time: then unroll it.
    x_BLD, _ = jax.lax.scan(
      apply,
      x_BLD,
      layers,
      unroll=self.arch.layers <= 4,
    )
    return rms_norm(x_BLD, self.final_norm_D[...], self.arch.norm_epsilon)


def _apply_layer(graph, x_BLD, layer, **kwargs):
  return nnx.merge(graph, layer)(x_BLD, **kwargs), None


def embed(tokens_BL, table_VD, dtype):
  """Rows of the table [B, L, D].

  Each device looks up all tokens in its part of the table's width, then the devices exchange
  what they found: far less than to gather the table and to sum its gradients, which are
  added up in the table's own type.
  """
  tokens_BL = constrain(tokens_BL, "replica", None)
  x_BLD = jnp.take(table_VD, tokens_BL, axis=0).astype(dtype)
  x_BLD = constrain(x_BLD, "replica", None, WIDTH)
  x_BLD = constrain(x_BLD, ROWS, None, "context")
  return constrain(x_BLD, ROWS, "context", None)


def project(x, weight, *, inputs: int = 1):
  """Contracts the last `inputs` axes of x [B, L, …] with the first ones of the weight."""
  if axis_size("context") > 1:  # B and L are split both: they cannot be one axis
    axes = tuple(range(x.ndim - inputs, x.ndim)), tuple(range(inputs))
    return jnp.tensordot(x, weight, axes)
  # As one matrix product over B · L tokens: with B and L apart, XLA's CPU backend
  # transposes the activations for every weight gradient, which doubles a layer's time.
  B, L = x.shape[:2]
  size = math.prod(weight.shape[:inputs])
  flat = x.reshape(B * L, size) @ weight.reshape(size, -1)
  return flat.reshape(B, L, *weight.shape[inputs:])


def rms_norm(x, scale_D, epsilon: float):
  """Root-mean-square norm (Zhang and Sennrich 2019) in float32, back to x's type."""
  wide = x.astype(jnp.float32)
  wide = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + epsilon)
  return wide.astype(x.dtype) * scale_D.astype(x.dtype)
