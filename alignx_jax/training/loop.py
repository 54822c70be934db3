"""The training loop: mesh, model, data, reference, step, checkpoints; top to bottom."""

import contextlib
import functools
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec
from tqdm import tqdm

from alignx_jax.data.loader import Loader
from alignx_jax.data.rows import Rows
from alignx_jax.models.decoder import Decoder
from alignx_jax.objectives.log_probs import response_log_probs
from alignx_jax.objectives.losses import dpo_loss
from alignx_jax.training import mesh as meshes
from alignx_jax.training.checkpoints import Checkpoints
from alignx_jax.training.metrics import MetricWriter, divide
from alignx_jax.training.optimizer import make_optimizer
from alignx_jax.training.reference import cache_key, cached_reference, counted_steps
from alignx_jax.training.run_config import check_run_config, save_run_config


class TrainState(NamedTuple):
  """What a checkpoint holds besides the data position."""

  step: jax.Array
  params: nnx.State
  optimizer: optax.OptState


def scorer(model: Decoder, params, mesh, *, rows: int, chunk: int) -> Callable[[Rows], jax.Array]:
  """A function from Rows to response log-probs [B, N, E] under `params`.

  Scorers of the same architecture and sizes share one compiled program.
  """
  graph = nnx.graphdef(model)
  sharding = meshes.rows_sharding(mesh, rows)
  return lambda rows: _score(params, jax.device_put(rows, sharding), graph=graph, chunk=chunk)


@functools.partial(jax.jit, static_argnames=("graph", "chunk"))
def _score(params, rows, *, graph, chunk):
  return response_log_probs(nnx.merge(graph, params), rows, chunk=chunk)


def train_step(state: TrainState, rows: Rows, *, graph, optimizer, beta, chunk, accumulation):
  """One update on `accumulation` equal parts of the rows, and its metrics as pairs.

  The parts' numerators and gradients are summed and divided once by all their examples,
  so the update is that of the whole batch however the examples fall on the parts.
  """

  def loss_sum(params, part):
    policy_BNE = response_log_probs(nnx.merge(graph, params), part, chunk=chunk)
    (numerator, _), metrics = dpo_loss(policy_BNE, part.reference_BNE, part.weight_BE, beta=beta)
    tokens = jnp.sum(part.segments_BL > 0).astype(jnp.float32)
    slots = jnp.float32(part.segments_BL.size)
    return numerator, metrics | {"filled": (tokens, slots)}

  def add_part(carry, part):
    gradient, metrics = jax.grad(loss_sum, has_aux=True)(state.params, part)
    return jax.tree.map(jnp.add, carry, (gradient, metrics)), None

  if accumulation == 1:
    gradient, metrics = jax.grad(loss_sum, has_aux=True)(state.params, rows)
  else:
    # Part i takes every accumulation-th row, so that each device keeps its own rows.
    parts = jax.tree.map(lambda x: x.reshape(-1, accumulation, *x.shape[1:]).swapaxes(0, 1), rows)
    shapes = jax.eval_shape(
      jax.grad(loss_sum, has_aux=True), state.params, jax.tree.map(lambda x: x[0], parts)
    )
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    (gradient, metrics), _ = jax.lax.scan(add_part, zeros, parts)
  examples = metrics["loss"][1]
  gradient = jax.tree.map(lambda g: g / jnp.maximum(examples, 1).astype(g.dtype), gradient)
  metrics["gradient_norm"] = (optax.tree.norm(gradient), jnp.float32(1))
  updates, new_optimizer = optimizer.update(gradient, state.optimizer, state.params)
  params = optax.apply_updates(state.params, updates)
  return TrainState(state.step + 1, params, new_optimizer), metrics


def state_shardings(state, params_sharding, mesh):
  """Shardings of a whole TrainState: moments lie as their parameters do."""
  replicated = NamedSharding(mesh, PartitionSpec())
  by_shape = {
    jax.tree_util.keystr(path): sharding
    for path, sharding in jax.tree_util.tree_leaves_with_path(params_sharding)
  }

  def sharding(path, leaf):
    name = jax.tree_util.keystr(path)
    match = next((s for key, s in by_shape.items() if name.endswith(key)), replicated)
    return match if leaf.ndim else replicated

  return jax.tree_util.tree_map_with_path(sharding, state)


class TrainResult(NamedTuple):
  """The trained model's parameters, and after how many steps."""

  params: nnx.State
  steps: int


def train(config, workdir: str | Path, *, model: Decoder, loader: Loader) -> TrainResult:
  """Trains `model` on the loader's stream with the DPO loss; resumes what it finds.

  Args:
    config: configs/base.py's; read here are `objective`, `optimizer`, `train`.
    workdir: gets checkpoints, metrics.jsonl and TensorBoard files. The same call again
      goes on from the newest checkpoint.
    model: the start of the policy, and the frozen reference.
  Raises:
    ValueError: the workdir holds a run of another config; or the data gives too few steps.
    FloatingPointError: the loss is not finite; names the step and the examples.
  """
  workdir = Path(workdir)
  workdir.mkdir(parents=True, exist_ok=True)

  # ------------------------------------------------------------------ mesh and model
  mesh = meshes.make_mesh(config.train.devices or None)
  rows_sharding = meshes.rows_sharding(mesh, loader.rows)
  graph, params = nnx.split(model)
  params = jax.device_put(params, meshes.param_shardings(params, mesh))

  # ------------------------------------------------------------------ reference and data
  log_probs = scorer(model, params, mesh, rows=loader.rows, chunk=config.train.head_chunk)
  directory = Path(config.reference.directory or workdir / "reference")
  loader.reference = cached_reference(log_probs, loader, directory, model=model)
  steps = config.train.steps
  # So many there are even if every row were full; only for more is it worth to count.
  if not 0 < steps <= loader.stream_length // (loader.rows * loader.formatting.regions.examples):
    available = counted_steps(loader, directory, model=model)
    steps = steps or available
    if not 0 < steps <= available:
      raise ValueError(
        f"The data gives {available} steps and config.train.steps asks for {steps}; set it lower, "
        "or raise config.train.epochs."
        if available
        else "Every training example was refused: the warnings above say why."
      )

  # ------------------------------------------------------------------ state
  optimizer = make_optimizer(config.optimizer, steps)

  def init(params):
    return TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params))

  shardings = state_shardings(
    jax.eval_shape(init, params), meshes.param_shardings(params, mesh), mesh
  )
  # The step donates its state: the policy starts as a copy, the caller's model stays whole.
  state = jax.jit(init, out_shardings=shardings)(jax.tree.map(jnp.copy, params))
  step_fn = jax.jit(
    functools.partial(
      train_step,
      graph=graph,
      optimizer=optimizer,
      beta=config.objective.beta,
      chunk=config.train.head_chunk,
      accumulation=config.train.accumulation,
    ),
    donate_argnums=0,
    out_shardings=(shardings, None),
  )

  # ------------------------------------------------------------------ resume
  lanes_BW = loader.start()
  checkpoints = Checkpoints(workdir, keep=config.train.keep_checkpoints)
  first = checkpoints.latest_step() or 0
  if first:
    check_run_config(config, workdir, cache_key(loader, model))
    state = checkpoints.restore(first, state)
    lanes_BW = checkpoints.restore_lanes(first, lanes_BW)
  else:
    save_run_config(config, workdir, cache_key(loader, model))
  batches = loader.batches(lanes_BW)
  writer = MetricWriter(workdir, first)

  # ------------------------------------------------------------------ loop
  pending = None

  def report(pending, bar):
    step, rows, metrics, started = pending
    metrics = divide(jax.device_get(metrics))
    if not np.isfinite(metrics["loss"] + metrics["gradient_norm"]):
      ids = [loader.examples[loader.stream.example(i)].id for i in _examples(rows)]
      raise FloatingPointError(
        f"Loss {metrics['loss']}, gradient norm {metrics['gradient_norm']} at step {step}, "
        f"examples {', '.join(ids)}; try a lower config.optimizer.learning_rate in a new --workdir."
      )
    seconds = time.perf_counter() - started
    metrics["tokens_per_second"] = float((rows.segments_BL > 0).sum()) / seconds
    metrics["examples_per_second"] = len(_examples(rows)) / seconds
    bar.update(1)
    bar.set_postfix_str(
      f"loss {metrics['loss']:.4f} acc {metrics['reward_accuracy']:.2f} "
      f"margin {metrics['margin']:.3f} {metrics['tokens_per_second']:.0f} tok/s"
    )
    if step % config.train.log_every == 0 or step == steps - 1:
      writer.write(step, metrics)

  with contextlib.ExitStack() as stack:
    stack.callback(checkpoints.close)
    stack.callback(writer.close)
    bar = stack.enter_context(tqdm(total=steps, initial=first, desc=workdir.name, unit="step"))
    started = time.perf_counter()
    for step in range(first, steps):
      rows, lanes_BW = next(batches, (None, lanes_BW))
      if rows is None:  # so many examples were refused
        raise ValueError(f"The data ended after {step} of {steps} steps; lower config.train.steps.")
      state, metrics = step_fn(state, jax.device_put(rows, rows_sharding))
      # Read the step before this one, while this one runs.
      if pending is not None:
        report(pending, bar)
        started = time.perf_counter()
      pending = (step, rows, metrics, started)
      if (step + 1) % config.train.checkpoint_every == 0 or step + 1 == steps:
        report(pending, bar)
        pending = None
        checkpoints.save(step + 1, state, lanes_BW)
        started = time.perf_counter()
  return TrainResult(state.params, steps)


def _examples(rows: Rows) -> list[int]:
  return rows.example_BE[rows.example_BE >= 0].tolist()
