"""The training loop: mesh, model, data, reference, step, checkpoints; top to bottom."""

import contextlib
import time
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from flax import nnx
from tqdm import tqdm

from alignx_jax.data.loader import PACKING, Loader
from alignx_jax.data.rows import Rows
from alignx_jax.models.decoder import Decoder
from alignx_jax.models.lora import split_trainable
from alignx_jax.training import hosts
from alignx_jax.training.bridge import bridge_objective, label_sample
from alignx_jax.training.checkpoints import Checkpoints
from alignx_jax.training.metrics import MetricWriter, divide
from alignx_jax.training.optimizer import make_optimizer
from alignx_jax.training.reference import (
  LogProbs,
  cache_key,
  cached_reference,
  counted_steps,
  fingerprint,
)
from alignx_jax.training.run_config import check_run_config, save_run_config
from alignx_jax.training.steps import count_dimensions, make_steps


class TrainResult(NamedTuple):
  """All parameters of the trained model, and after how many steps."""

  params: nnx.State
  steps: int


def train(
  config, workdir: str | Path, *, model: Decoder, params: nnx.State, mesh, loader: Loader
) -> TrainResult:
  """Trains `model` on the loader's stream with the DPO loss; resumes what it finds.

  Args:
    config: configs/base.py's; read here are `bridge`, `objective`, `optimizer`, `reference` and
      `train`.
    workdir: gets checkpoints, metrics.jsonl and TensorBoard files. The same call again
      goes on from the newest checkpoint.
    model: shapes alone.
    params: the start of the policy, and the frozen reference; they are given away.
    mesh: on which the parameters lie.
  Raises:
    ValueError: the workdir holds a run of another config; or the data gives too few steps.
    FloatingPointError: the loss is not finite; names the step and the examples.
  """
  workdir = Path(workdir)
  workdir.mkdir(parents=True, exist_ok=True)

  # ------------------------------------------------------------------ reference and data
  log_probs = LogProbs(model, params, mesh, loader.rows, config.train.head_chunk)
  weights = fingerprint(params)
  key = cache_key(loader, model, weights)
  run_key = f"{key}-{PACKING}"
  directory = config.reference.directory or workdir / "reference"
  if config.reference.kind == "cached":
    loader.reference = cached_reference(log_probs, loader, directory, weights)
  own = log_probs.own
  steps = config.train.steps
  # So many there are even if every row were full; only for more is it worth to count.
  if not 0 < steps <= loader.stream_length // (loader.rows * loader.formatting.regions.examples):
    available = counted_steps(loader, directory, own, key=key)
    steps = steps or available
    if not 0 < steps <= available:
      raise ValueError(
        f"The data gives {available} steps and config.train.steps asks for {steps}; set it lower, "
        "or raise config.train.epochs."
        if available
        else "Every training example was refused: the warnings above say why."
      )

  # ------------------------------------------------------------------ programs and state
  bridge = None
  if count_dimensions(model):
    labels_XP = label_sample(loader.examples, loader.formatting)
    bridge = bridge_objective(config, loader.formatting.space_of_bridge, labels_XP, steps)
  optimizer = make_optimizer(
    config.optimizer, steps, bridge_learning_rate=config.bridge.learning_rate if bridge else 0.0
  )
  programs = make_steps(config, model, mesh, loader.formatting.regions, optimizer, bridge)
  rows_sharding = programs.rows.tokens_BL.sharding
  del log_probs
  trained, frozen = split_trainable(params, bridge_alone=config.bridge.alone)
  del params

  # ------------------------------------------------------------------ resume
  lanes_BW = loader.start()[own]
  checkpoints = Checkpoints(workdir, keep=config.train.keep_checkpoints)
  first = checkpoints.latest_step() or 0
  if first:
    check_run_config(config, workdir, run_key)
    del trained  # room for the state
    state = checkpoints.restore(first, programs.state)
    lanes_BW = checkpoints.restore_lanes(first, loader.start())[own]
  else:
    if hosts.is_first():
      save_run_config(config, workdir, run_key)
    with jax.set_mesh(mesh):
      state = programs.init(trained)
    del trained
  batches = loader.batches(lanes_BW, endless=True)
  writer = MetricWriter(workdir, first) if hosts.is_first() else None

  # ------------------------------------------------------------------ loop
  pending = None

  def report(pending, bar):
    step, rows, metrics, started = pending
    metrics = jax.device_get(metrics)
    counts = {"tokens": float(metrics["filled"][0]), "examples": float(metrics["loss"][1])}
    metrics = divide(metrics)
    if not counts["examples"]:  # so many examples were refused
      raise ValueError(f"The data ended after {step} of {steps} steps; lower config.train.steps.")
    if not np.isfinite(metrics["loss"] + metrics["gradient_norm"]):
      ids = [loader.examples[loader.stream.example(i)].id for i in _examples(rows)]
      raise FloatingPointError(
        f"Loss {metrics['loss']}, gradient norm {metrics['gradient_norm']} at step {step}, "
        f"examples {', '.join(ids)}; try a lower config.optimizer.learning_rate in a new --workdir."
      )
    seconds = time.perf_counter() - started
    metrics["tokens_per_second"] = counts["tokens"] / seconds
    metrics["examples_per_second"] = counts["examples"] / seconds
    bar.update(1)
    bar.set_postfix_str(
      f"loss {metrics['loss']:.4f} acc {metrics['reward_accuracy']:.2f} "
      f"margin {metrics['margin']:.3f} {metrics['tokens_per_second']:.0f} tok/s"
    )
    if writer and (step % config.train.log_every == 0 or step == steps - 1):
      writer.write(step, metrics)

  with contextlib.ExitStack() as stack:
    stack.callback(checkpoints.close)
    if writer:
      stack.callback(writer.close)
    stack.enter_context(jax.set_mesh(mesh))
    hidden = not hosts.is_first()
    bar = tqdm(total=steps, initial=first, desc=workdir.name, unit="step", disable=hidden)
    stack.enter_context(bar)
    started = time.perf_counter()
    for step in range(first, steps):
      rows, lanes_BW = next(batches)
      state, metrics = programs.train(
        state, frozen, hosts.to_devices(rows, rows_sharding, loader.rows)
      )
      # Read the step before this one, while this one runs.
      if pending is not None:
        report(pending, bar)
        started = time.perf_counter()
      pending = (step, rows, metrics, started)
      if (step + 1) % config.train.checkpoint_every == 0 or step + 1 == steps:
        report(pending, bar)
        pending = None
        lanes = hosts.gather_rows(lanes_BW, rows_sharding, loader.rows)
        checkpoints.save(step + 1, state, lanes)
        started = time.perf_counter()
  return TrainResult(nnx.merge_state(state.params, frozen), steps)


def _examples(rows: Rows) -> list[int]:
  return rows.example_BE[rows.example_BE >= 0].tolist()
