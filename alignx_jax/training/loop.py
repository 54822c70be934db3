"""The training loop: mesh, model, data, reference, step, checkpoints; top to bottom."""

import contextlib
import functools
import json
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import logging
from flax import nnx
from flax.traverse_util import flatten_dict
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
from alignx_jax.training.reference import cached_reference, fingerprint_weights


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
  """The trained model's parameters, and where and how it was trained."""

  params: nnx.State
  steps: int
  counts: dict[str, int]


def train(
  config,
  workdir: str | Path,
  *,
  model: Decoder,
  loader: Loader,
  evaluate: Callable[[nnx.State], dict[str, float]] | None = None,
) -> TrainResult:
  """Trains `model` on the loader's stream with the DPO loss; resumes what it finds.

  Args:
    config: configs/base.py's; read here are `objective`, `optimizer`, `train`.
    workdir: gets checkpoints, metrics.jsonl and TensorBoard files. The same call again
      goes on from the newest checkpoint.
    model: the start of the policy, and the frozen reference.
    evaluate: called with the parameters at the end of training; what it returns is
      written with the metrics.
  Raises:
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
  loader.reference = cached_reference(
    log_probs, loader, directory, weights=fingerprint_weights(params)
  )
  loader.counts.clear()
  steps = config.train.steps or sum(1 for _ in loader.dataset())
  counts = dict(loader.counts)
  _report_counts(counts, loader)

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
  iterator = iter(loader.dataset())
  checkpoints = Checkpoints(workdir, keep=config.train.keep_checkpoints)
  first = 0
  if (latest := checkpoints.latest_step()) is not None:
    state = checkpoints.restore(latest, state, iterator)
    first = latest
    logging.info("Resumed at step %d of %d from %s.", first, steps, workdir)
  writer = MetricWriter(workdir, first)

  # ------------------------------------------------------------------ loop
  pending = None

  def report(pending, bar):
    step, rows, metrics, started = pending
    metrics = divide(jax.device_get(metrics))
    if not np.isfinite(metrics["loss"]):
      ids = [loader.examples[i % len(loader.examples)].id for i in _examples(rows)]
      raise FloatingPointError(
        f"Loss {metrics['loss']} at step {step}, examples {', '.join(ids)}. The newest "
        f"checkpoint in {workdir} is from before; lower optimizer.learning_rate."
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
      rows = next(iterator, None)
      if rows is None:
        raise ValueError(
          f"The data ends after {step} steps; raise config.train.epochs or lower "
          f"config.train.steps from {steps}."
        )
      state, metrics = step_fn(state, jax.device_put(rows, rows_sharding))
      # Read the step before this one, while this one runs.
      if pending is not None:
        report(pending, bar)
        started = time.perf_counter()
      pending = (step, rows, metrics, started)
      if (step + 1) % config.train.checkpoint_every == 0 or step + 1 == steps:
        report(pending, bar)
        pending = None
        checkpoints.save(step + 1, state, iterator)
        started = time.perf_counter()
    if evaluate is not None:
      writer.write(steps, evaluate(state.params))
  return TrainResult(state.params, steps, counts)


def _examples(rows: Rows) -> list[int]:
  return rows.example_BE[rows.example_BE >= 0].tolist()


def _report_counts(counts: dict[str, int], loader: Loader) -> None:
  for what, count in counts.items():
    logging.warning(
      "%s: %d, of a stream of %d examples; widen config.regions.", what, count, loader.stream_length
    )


# What may differ between a run and its resumption: how, not what, is trained.
_FREE = re.compile(r"eval\..*|reference\.directory|train\.(devices|keep_checkpoints|\w+_every)")


def write_config(config: Any, workdir: Path) -> None:
  """config.json beside what it made.

  Raises:
    ValueError: the workdir holds a run that another config made; names the fields.
  """
  path = workdir / "config.json"
  new = json.loads(json.dumps(config.to_dict()))
  if path.exists():
    old = flatten_dict(json.loads(path.read_text(encoding="utf-8")), sep=".")
    now = flatten_dict(new, sep=".")
    changed = [
      f"{name} was {old.get(name)!r} and is {now.get(name)!r}"
      for name in sorted(old.keys() | now.keys())
      if old.get(name) != now.get(name) and not _FREE.fullmatch(name)
    ]
    if changed:
      raise ValueError(
        f"{workdir} holds a run with another config: {'; '.join(changed)}. Use another --workdir."
      )
  workdir.mkdir(parents=True, exist_ok=True)
  path.write_text(json.dumps(new, indent=2) + "\n", encoding="utf-8")
