"""The compiled programs of a run: scoring rows, and one training step; on any mesh.

They are made from shapes alone, so that the program of a pod can be compiled where there
is none (compile.py); the loop gives them arrays.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh

from alignx_jax.data.rows import Regions, Rows
from alignx_jax.models.decoder import Decoder
from alignx_jax.models.lora import split_trainable, without_lora
from alignx_jax.objectives.log_probs import response_log_probs
from alignx_jax.objectives.losses import dpo_loss
from alignx_jax.training import mesh as meshes


class TrainState(NamedTuple):
  """What a checkpoint holds besides the data position.

  Attributes:
    params: what is trained: all parameters, or the factors of LoRA.
  """

  step: jax.Array
  params: nnx.State
  optimizer: optax.OptState


class Steps(NamedTuple):
  """Functions under `jax.set_mesh(mesh)`, compiled at their first call.

  Attributes:
    init: (params) to TrainState; params are given away.
    train: (TrainState, frozen, Rows) to (TrainState, metrics as pairs); the state is given away.
    state: shapes and shardings of a TrainState.
    frozen: of the parameters that are not trained.
    rows: of the Rows of a step.
  """

  init: Callable
  train: Callable
  state: TrainState
  frozen: nnx.State
  rows: Rows


def make_steps(
  config, model: Decoder, mesh: Mesh, regions: Regions, optimizer: optax.GradientTransformation
) -> Steps:
  """The training programs of a config.

  Args:
    config: configs/base.py's; read here are `objective`, `reference` and `train`.
    model: arrays or shapes alone.
  Raises:
    ValueError: sizes that do not divide by the mesh.
  """
  shapes = param_shapes(model, mesh)
  trained, frozen = split_trainable(shapes)
  online = config.reference.kind == "online"

  def init(params):
    return TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(as_float32(params)))

  state = jax.eval_shape(init, trained)
  state = _with_shardings(state, state_shardings(state, meshes.param_shardings(trained, mesh)))
  shardings = jax.tree.map(lambda x: x.sharding, state)
  train = functools.partial(
    train_step,
    graph=nnx.graphdef(model),
    optimizer=optimizer,
    beta=config.objective.beta,
    chunk=config.train.head_chunk,
    accumulation=config.train.accumulation,
    online=online,
  )
  return Steps(
    init=jax.jit(init, donate_argnums=0, out_shardings=shardings),
    train=jax.jit(
      train,
      donate_argnums=0,
      out_shardings=(shardings, meshes.replicated(mesh)),
      compiler_options=compiler_options(mesh),
    ),
    state=state,
    frozen=frozen,
    rows=row_shapes(regions, config.train.rows, mesh),
  )


# ------------------------------------------------------------------ shapes and shardings


def param_shapes(model: Decoder, mesh: Mesh) -> nnx.State:
  """Shapes and shardings of a model's parameters."""
  shapes = jax.eval_shape(lambda: nnx.state(model))
  return _with_shardings(shapes, meshes.param_shardings(shapes, mesh))


def row_shapes(regions: Regions, rows: int, mesh: Mesh) -> Rows:
  """Shapes and shardings of a batch of Rows."""
  sharding = meshes.rows_sharding(mesh, rows)
  L, R, E = regions.layout, regions.response, regions.examples
  shapes = [(L,), (L,), (L,), (2, R), (E,), (2, E), (E,)]
  types = [np.int32] * 4 + [np.float32] * 2 + [np.int32]
  return Rows(
    *(
      jax.ShapeDtypeStruct((rows, *shape), dtype, sharding=sharding)
      for shape, dtype in zip(shapes, types, strict=True)
    )
  )


def state_shardings(state: TrainState, params_sharding) -> TrainState:
  """Shardings of a whole TrainState: moments lie as their parameters do."""
  by_name = {
    jax.tree_util.keystr(path): sharding
    for path, sharding in jax.tree_util.tree_leaves_with_path(params_sharding)
  }
  whole = meshes.replicated(next(iter(by_name.values())).mesh)

  def sharding(path, leaf):
    name = jax.tree_util.keystr(path)
    match = next((s for key, s in by_name.items() if name.endswith(key)), whole)
    return match if leaf.ndim else whole

  return jax.tree_util.tree_map_with_path(sharding, state)


def _with_shardings(shapes, shardings):
  return jax.tree.map(
    lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
    shapes,
    shardings,
  )


# ------------------------------------------------------------------ the programs


@functools.cache
def score_program(graph, mesh: Mesh, chunk: int) -> Callable:
  """(parameters, Rows) to response log-probs [B, N, E] in nats and the slots [B, E] they are of.

  Both come whole to every device. Models of the same architecture share the program.
  """

  def score(params, rows):
    log_probs_BNE = response_log_probs(nnx.merge(graph, params), rows, chunk=chunk)
    return log_probs_BNE, rows.example_BE

  return jax.jit(
    score, out_shardings=meshes.replicated(mesh), compiler_options=compiler_options(mesh)
  )


def compiler_options(mesh: Mesh) -> dict[str, str] | None:
  """What XLA is told for the devices of a mesh."""
  if mesh.devices.flat[0].platform != "tpu":
    return None
  # By default the gathering of a layer's weights becomes a loop of partial products, which
  # reads and writes its sums anew each time: twice the estimated time of a step.
  return {"xla_jf_spmd_threshold_for_windowed_einsum_mib": "100000"}


def train_step(
  state: TrainState,
  frozen: nnx.State,
  rows: Rows,
  *,
  graph,
  optimizer: optax.GradientTransformation,
  beta: float,
  chunk: int,
  accumulation: int,
  online: bool,
) -> tuple[TrainState, dict]:
  """One update, and its metrics as (numerator, denominator) pairs."""
  gradient, metrics = mean_gradient(
    state.params,
    frozen,
    rows,
    graph=graph,
    beta=beta,
    chunk=chunk,
    accumulation=accumulation,
    online=online,
  )
  metrics["gradient_norm"] = (optax.tree.norm(gradient), jnp.float32(1))
  updates, moments = optimizer.update(gradient, state.optimizer, as_float32(state.params))
  params = add_updates(state.params, updates, state.step)
  return TrainState(state.step + 1, params, moments), metrics


def mean_gradient(params, frozen, rows, *, graph, beta, chunk, accumulation, online):
  """Gradient of the mean DPO loss, float32, on `accumulation` equal parts of the rows.

  The parts' numerators and gradients are summed and divided once by all their examples, so
  the result is that of the whole batch however the examples fall on the parts.

  Args:
    online: take the reference's log-probs from the policy without its adapter, not from the
      rows.
  Returns:
    The gradient of `params`, and metrics as (numerator, denominator) pairs.
  """

  def log_probs(params, part):
    model = nnx.merge(graph, nnx.merge_state(params, frozen))
    return response_log_probs(model, part, chunk=chunk)

  def loss_sum(params, part):
    reference_BNE = part.reference_BNE
    if online:
      reference_BNE = jax.lax.stop_gradient(log_probs(without_lora(params), part))
    policy_BNE = log_probs(params, part)
    (numerator, _), metrics = dpo_loss(policy_BNE, reference_BNE, part.weight_BE, beta=beta)
    tokens = jnp.sum(part.segments_BL > 0).astype(jnp.float32)
    slots = jnp.float32(part.segments_BL.size)
    return numerator, metrics | {"filled": (tokens, slots)}

  def of_part(part):
    gradient, metrics = jax.grad(loss_sum, has_aux=True)(params, part)
    return as_float32(gradient), metrics

  if accumulation == 1:
    gradient, metrics = of_part(rows)
  else:
    # Part i takes every accumulation-th row, so that each device keeps its own rows.
    parts = jax.tree.map(lambda x: x.reshape(-1, accumulation, *x.shape[1:]).swapaxes(0, 1), rows)
    shapes = jax.eval_shape(of_part, jax.tree.map(lambda x: x[0], parts))
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    add = lambda sums, part: (jax.tree.map(jnp.add, sums, of_part(part)), None)
    (gradient, metrics), _ = jax.lax.scan(add, zeros, parts)
  examples = metrics["loss"][1]
  return jax.tree.map(lambda g: g / jnp.maximum(examples, 1), gradient), metrics


def as_float32(tree):
  """The same arrays as float32."""
  return jax.tree.map(lambda x: x.astype(jnp.float32), tree)


def add_updates(params, updates, step):
  """Parameters after an update.

  Parameters stored in bfloat16 are rounded up or down by chance, in proportion: an update is
  often less than half the distance between two bfloat16 numbers, and rounding to the nearest
  would lose it each time. The chance is a function of the step.
  """

  def add(i, param, update):
    new = param.astype(jnp.float32) + update
    if param.dtype != jnp.bfloat16:
      return new.astype(param.dtype)
    bits = jax.lax.bitcast_convert_type(new, jnp.uint32)
    noise = jax.random.bits(jax.random.fold_in(jax.random.key(i), step), new.shape, jnp.uint16)
    bits = (bits + noise) & jnp.uint32(0xFFFF0000)
    rounded = jax.lax.bitcast_convert_type(bits, jnp.float32)
    return jnp.where(jnp.isfinite(new), rounded, new).astype(jnp.bfloat16)

  leaves, treedef = jax.tree.flatten(params)
  new = [add(i, *pair) for i, pair in enumerate(zip(leaves, jax.tree.leaves(updates), strict=True))]
  return jax.tree.unflatten(treedef, new)
