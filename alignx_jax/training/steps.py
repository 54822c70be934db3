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

from alignx_jax.data.rows import Personas, Regions, Rows
from alignx_jax.models.bridge import infer
from alignx_jax.models.decoder import Decoder
from alignx_jax.models.latent import encode
from alignx_jax.models.lora import split_trainable, without_lora
from alignx_jax.objectives.groups import GroupObjective
from alignx_jax.objectives.log_probs import response_lengths, response_log_probs
from alignx_jax.objectives.losses import PreferenceLoss, reference_kind
from alignx_jax.objectives.pba import BridgeObjective, bridged_log_probs, only_rows
from alignx_jax.objectives.vpl import LatentObjective, latent_log_probs
from alignx_jax.training import mesh as meshes

# What gives the log-probs of a policy that reads something learned of its user: with that, what
# is added to the loss of each example [B, E], and metrics.
LOG_PROBS = {BridgeObjective: bridged_log_probs, LatentObjective: latent_log_probs}


class TrainState(NamedTuple):
  """What a checkpoint holds besides the data position.

  Attributes:
    params: what is trained: all parameters, or the factors of LoRA.
    group_weights: q [G], where the loss is weighted by group.
  """

  step: jax.Array
  params: nnx.State
  optimizer: optax.OptState
  group_weights: jax.Array | None = None


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
  config,
  model: Decoder,
  mesh: Mesh,
  regions: Regions,
  optimizer: optax.GradientTransformation,
  bridge: BridgeObjective | LatentObjective | None = None,
  groups: GroupObjective | None = None,
) -> Steps:
  """The training programs of a config.

  Args:
    config: configs/base.py's; read here are `bridge`, `objective`, `reference` and `train`.
    model: arrays or shapes alone.
    bridge: how the model's learned bridge, or its latent variable, is trained, if it has one.
    groups: how groups are weighted, if they are.
  Raises:
    ValueError: sizes that do not divide by the mesh.
  """
  shapes = param_shapes(model, mesh)
  trained, frozen = split_trainable(shapes, bridge_alone=config.bridge.alone)
  online = reference_kind(config) == "online"

  def init(params):
    moments, weights_G = optimizer.init(as_float32(params)), groups and groups.start()
    return TrainState(jnp.zeros((), jnp.int32), params, moments, weights_G)

  state = jax.eval_shape(init, trained)
  state = _with_shardings(state, state_shardings(state, meshes.param_shardings(trained, mesh)))
  shardings = jax.tree.map(lambda x: x.sharding, state)
  train = functools.partial(
    train_step,
    graph=nnx.graphdef(model),
    optimizer=optimizer,
    loss=PreferenceLoss.of(config.objective),
    chunk=config.train.head_chunk,
    accumulation=config.train.accumulation,
    online=online,
    bridge=bridge,
    groups=groups,
  )
  rows = row_shapes(regions, config.train.rows, mesh, dimensions=count_dimensions(model))
  if groups is not None:
    rows = rows._replace(group_BE=rows.example_BE)
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
    rows=rows,
  )


# ------------------------------------------------------------------ shapes and shardings


def param_shapes(model: Decoder, mesh: Mesh) -> nnx.State:
  """Shapes and shardings of a model's parameters."""
  shapes = jax.eval_shape(lambda: nnx.state(model))
  return _with_shardings(shapes, meshes.param_shardings(shapes, mesh))


def count_dimensions(model: Decoder) -> int:
  """P, of the model's learned bridge; 0 if it has none."""
  return len(model.bridge.bias_PK) if hasattr(model, "bridge") else 0


def has_latent(model: Decoder) -> bool:
  """Whether the model has a latent user variable."""
  return hasattr(model, "latent")


def row_shapes(
  regions: Regions, rows: int, mesh: Mesh, *, dimensions: int = 0, given: bool = False
) -> Rows:
  """Shapes and shardings of a batch of Rows.

  Args:
    dimensions: P, of a learned bridge; 0 without.
    given: P̃ is given to it, and no personas.
  """
  sharding = meshes.rows_sharding(mesh, rows)
  L, R, E = regions.layout, regions.response, regions.examples
  U, X, P = regions.persona, regions.parts, dimensions

  def array(*shape, dtype=np.int32):
    return jax.ShapeDtypeStruct((rows, *shape), dtype, sharding=sharding)

  floats = functools.partial(array, dtype=np.float32)
  labels = functools.partial(array, dtype=np.int8)
  shapes = Rows(array(L), array(L), array(L), array(2, R), floats(E), floats(2, E), array(E))
  if given:
    return shapes._replace(preferences_BEPK=floats(E, P, 3))
  if not U:
    return shapes
  tokens = array(U), array(U), array(U), array(X), array(X)
  known = (labels(X, P), labels(E, P)) if P else (None, None)
  return shapes._replace(personas=Personas(*tokens, *known))


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
  """(parameters, Rows) to response log-probs [B, E, N] in nats and the slots [B, E] they are of.

  Where the rows give P̃, the policy reads it through its bridge; where they have personas, it
  reads the mean of its latent variable. Both results come whole to every device. Models of the
  same architecture share the program.
  """

  def score(params, rows):
    model = nnx.merge(graph, params)
    latent_BEZ = encode(model, rows).mean_BEZ if has_latent(model) and rows.personas else None
    log_probs_BNE = response_log_probs(
      model, rows, rows.preferences_BEPK, latent_BEZ=latent_BEZ, chunk=chunk
    )
    return log_probs_BNE.swapaxes(1, 2), rows.example_BE

  return jax.jit(
    score, out_shardings=meshes.replicated(mesh), compiler_options=compiler_options(mesh)
  )


@functools.cache
def infer_program(graph, mesh: Mesh) -> Callable:
  """(parameters, Rows) to the log-odds of P̃ [B, E, P, K] and the slots [B, E] they are of."""

  def infer_rows(params, rows):
    return infer(nnx.merge(graph, params), rows.personas)[0], rows.example_BE

  return jax.jit(
    infer_rows, out_shardings=meshes.replicated(mesh), compiler_options=compiler_options(mesh)
  )


@functools.cache
def posterior_program(graph, mesh: Mesh) -> Callable:
  """(parameters, Rows) to mean and log-variance of z [B, E, 2, Z] and the slots they are of."""

  def encode_rows(params, rows):
    posterior = encode(nnx.merge(graph, params), rows)
    return jnp.stack(posterior, axis=2), rows.example_BE

  return jax.jit(
    encode_rows, out_shardings=meshes.replicated(mesh), compiler_options=compiler_options(mesh)
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
  loss: PreferenceLoss,
  chunk: int,
  accumulation: int,
  online: bool,
  bridge: BridgeObjective | LatentObjective | None = None,
  groups: GroupObjective | None = None,
) -> tuple[TrainState, dict]:
  """One update, and its metrics as (numerator, denominator) pairs.

  Where the loss or the gradient is not finite, the update is left out: `skipped` is then 1.
  """
  gradient, metrics = mean_gradient(
    state.params,
    frozen,
    rows,
    graph=graph,
    loss=loss,
    chunk=chunk,
    accumulation=accumulation,
    online=online,
    bridge=bridge,
    step=state.step,
    groups=groups,
    weights_G=state.group_weights,
  )
  rows_trained = getattr(bridge, "rows", None)
  if rows_trained is not None:
    gradient = only_rows(gradient, rows_trained)
  norm = optax.tree.norm(gradient)
  metrics["gradient_norm"] = (norm, jnp.float32(1))
  finite = jnp.isfinite(norm) & jnp.isfinite(metrics["loss"][0])
  metrics["skipped"] = (1 - finite.astype(jnp.float32), jnp.float32(1))
  updates, moments = optimizer.update(gradient, state.optimizer, as_float32(state.params))
  if rows_trained is not None:
    updates = only_rows(updates, rows_trained)  # weights decay without a gradient too
  params = add_updates(state.params, updates, state.step)
  # What is not finite is not stepped into.
  new, old = (params, moments), (state.params, state.optimizer)
  weights_G = state.group_weights
  if groups is not None:
    metrics |= {
      f"weight/{n}": (q, jnp.float32(1)) for n, q in zip(groups.names, weights_G, strict=True)
    }
    new, old = (*new, groups.updated(weights_G, metrics)), (*old, weights_G)
  params, moments, *rest = jax.tree.map(lambda x, y: jnp.where(finite, x, y), new, old)
  return TrainState(state.step + 1, params, moments, *rest), metrics


def mean_gradient(
  params,
  frozen,
  rows,
  *,
  graph,
  loss,
  chunk,
  accumulation,
  online,
  bridge=None,
  step=0,
  groups=None,
  weights_G=None,
):
  """Gradient of the mean loss, float32, on `accumulation` equal parts of the rows.

  The parts' numerators and gradients are summed and divided once by all their examples, so
  the result is that of the whole batch however the examples fall on the parts.

  Args:
    loss: of the log-probs.
    online: take the reference's log-probs from the policy without its adapter, not from the
      rows.
    bridge: how a learned bridge or a latent variable is trained, if the model has one; `step` is
      for it.
    groups: how the loss of the log-probs is weighted by group, if it is, and the `weights_G`.
  Returns:
    The gradient of `params`, and metrics as (numerator, denominator) pairs.
  """

  def model(params):
    return nnx.merge(graph, nnx.merge_state(params, frozen))

  def loss_sum(params, part):
    reference_BNE = part.reference_BNE
    if online:
      reference_BNE = response_log_probs(model(without_lora(params)), part, chunk=chunk)
      reference_BNE = jax.lax.stop_gradient(reference_BNE)
    beside_BE, beside_metrics = 0.0, {}
    if bridge is None:
      policy_BNE = response_log_probs(model(params), part, chunk=chunk)
    else:
      told = LOG_PROBS[type(bridge)](model(params), part, bridge, step, chunk=chunk)
      policy_BNE, beside_BE, beside_metrics = told
    lengths_BNE = response_lengths(part)
    (numerator, _), metrics = loss(policy_BNE, reference_BNE, lengths_BNE, part.weight_BE)
    if groups is not None:
      _, loss_BE = loss.of_examples(policy_BNE, reference_BNE, lengths_BNE)
      of_groups = loss_BE, part.group_BE, part.weight_BE, weights_G
      numerator, group_losses = groups.loss_sum(*of_groups)
      metrics |= group_losses
    numerator += jnp.sum(beside_BE)
    used = [part.segments_BL] + ([part.personas.parts_BU] if part.personas else [])
    tokens = sum(jnp.sum(segments > 0) for segments in used).astype(jnp.float32)
    slots = jnp.float32(sum(segments.size for segments in used))
    return numerator, metrics | beside_metrics | {"filled": (tokens, slots)}

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
