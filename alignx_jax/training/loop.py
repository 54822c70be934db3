"""The training loop: mesh, model, data, reference, step, checkpoints; top to bottom."""

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax
from absl import logging
from flax import nnx

from alignx_jax.data.loader import PACKING, Loader
from alignx_jax.files import as_path, write_text
from alignx_jax.models.decoder import Decoder
from alignx_jax.models.lora import split_trainable
from alignx_jax.objectives.groups import GroupObjective
from alignx_jax.objectives.losses import reference_kind
from alignx_jax.training import hosts
from alignx_jax.training.bridge import SPACE, objective_beside
from alignx_jax.training.checkpoints import (
  Checkpoints,
  Restored,
  lanes_from_json,
  lanes_to_json,
)
from alignx_jax.training.monitor import Monitor, Pending
from alignx_jax.training.optimizer import make_optimizer
from alignx_jax.training.reference import (
  LogProbs,
  cache_key,
  cached_reference,
  counted_steps,
  fingerprint,
)
from alignx_jax.training.run_config import check_config, run_record, save_run_config
from alignx_jax.training.steps import count_dimensions, has_latent, make_steps
from alignx_jax.training.stopping import EXIT_CODE, StopRequest, any_host
from alignx_jax.training.workdir import in_use


class TrainResult(NamedTuple):
  """All parameters of the trained model, and after how many steps."""

  params: nnx.State
  steps: int


def train(
  config,
  workdir: str | Path,
  *,
  model: Decoder,
  params: nnx.State,
  mesh,
  loader: Loader,
  evaluate: Callable[[nnx.State], float] | None = None,
  ideal_seconds: float | None = None,
) -> TrainResult:
  """Trains `model` on the loader's stream with a preference loss; resumes what it finds.

  Args:
    config: configs/base.py's; read here are `bridge`, `eval.every`, `latent`, `objective`,
      `optimizer`, `reference` and `train`.
    workdir: gets checkpoints, metrics.jsonl and TensorBoard files. The same call again
      goes on from the newest good checkpoint.
    model: shapes alone.
    params: the start of the policy, and the frozen reference; they are given away.
    mesh: on which the parameters lie.
    evaluate: all parameters to alignment accuracy, every `eval.every` steps.
    ideal_seconds: see Monitor.
  Raises:
    ValueError: the workdir holds a run of another config; or the data gives too few steps.
    FloatingPointError: steps in a row are not finite; names them and the examples.
    OSError: the workdir cannot be written to, or a live run writes to it.
    SystemExit: asked to stop by SIGTERM or Ctrl-C; the state is saved.
  """
  with in_use(workdir):
    return _train(config, as_path(workdir), model, params, mesh, loader, evaluate, ideal_seconds)


def _train(config, workdir, model, params, mesh, loader, evaluate, ideal_seconds) -> TrainResult:
  hosts.barrier("start", config.train.barrier_seconds)

  # ------------------------------------------------------------------ reference and data
  log_probs = LogProbs(model, params, mesh, loader.rows, config.train.head_chunk)
  weights = fingerprint(params)
  key = cache_key(loader, model, weights)
  run_key = f"{key}-{PACKING}"
  record = run_record(config, run_key, loader.formatting)
  hosts.check_same(
    {
      "config": repr(config.to_dict()),
      "code": record["version"],
      "data, tokenizer and base model": run_key,
      "mesh": repr(dict(mesh.shape)),
    }
  )
  checkpoints = Checkpoints(
    workdir, keep=config.train.keep_checkpoints, every=config.train.keep_every
  )
  check = lambda run: check_config(config, run["config"], str(workdir), run_key)
  checkpoints.check_newest(check)  # before the reference is paid for
  directory = config.reference.directory or workdir / "reference"
  if reference_kind(config) == "cached":
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

  # ------------------------------------------------------------------ programs
  beside = objective_beside(config, model, loader, steps)
  own_rate = (config.latent if has_latent(model) else config.bridge).learning_rate
  optimizer = make_optimizer(
    config.optimizer, steps, bridge_learning_rate=own_rate if beside else 0.0
  )
  groups = GroupObjective.of(config.objective, loader.grouping)
  regions = loader.formatting.regions
  programs = make_steps(config, model, mesh, regions, optimizer, beside, groups)
  rows_sharding = programs.rows.tokens_BL.sharding
  del log_probs
  trained, frozen = split_trainable(params, bridge_alone=config.bridge.alone)
  del params

  # ------------------------------------------------------------------ resume
  restored = _restore(config.train.restore, checkpoints, programs.state, check)
  lanes_BW, first = loader.start(), 0
  if restored:
    del trained  # room for the state
    first, state = restored.step, restored.state
    lanes_BW = lanes_from_json(restored.run["lanes"], lanes_BW)
    if restored.run["version"] != record["version"]:
      logging.warning(
        "The code was %s at step %d and is %s.", restored.run["version"], first, record["version"]
      )
  else:
    with jax.set_mesh(mesh):
      state = programs.init(trained)
    del trained
  if hosts.is_first():
    save_run_config(config, workdir, run_key)
    if count_dimensions(model):
      write_text(workdir / SPACE, loader.formatting.space_of_bridge.to_json())
  lanes_BW = lanes_BW[own]
  batches = loader.batches(lanes_BW, endless=True)
  record |= {"restored": config.train.restore}

  # ------------------------------------------------------------------ loop
  with contextlib.ExitStack() as stack:
    stack.callback(checkpoints.close)
    gather = lambda lanes_BW: hosts.gather_rows(lanes_BW, rows_sharding, loader.rows)
    monitor = Monitor(
      config,
      workdir,
      loader,
      first=first,
      steps=steps,
      ideal_seconds=ideal_seconds,
      fingerprint=run_key,
      gather=gather,
    )
    stack.callback(monitor.close)
    stack.enter_context(jax.set_mesh(mesh))
    stack.enter_context(jax.transfer_guard_device_to_host("disallow"))
    request = stack.enter_context(StopRequest())
    asked_anywhere = any_host()
    monitor.log.write("start", step=first, steps=steps, version=record["version"])
    pending, stop, alone = None, False, jax.process_count() == 1
    profile_from, profile_to = config.train.profile

    def save(done, accuracy=None):
      with monitor.spending("checkpoint"), jax.transfer_guard_device_to_host("allow"):
        run = record | {"lanes": lanes_to_json(gather(lanes_BW))}
        checkpoints.save(done, state, run, accuracy=accuracy)
      monitor.log.write("save", step=done)
      monitor.sync()

    def report(pending, done):
      try:
        return monitor.report(pending)
      except FloatingPointError:
        save(done)  # what is to be replayed with
        raise

    for step in range(first, steps):
      if step == profile_from < profile_to:
        jax.profiler.start_trace(str(monitor.directory / "profile"))
      with monitor.spending("data"):
        before_BW = lanes_BW
        rows, lanes_BW = next(batches)
        arrays = hosts.to_devices(rows, rows_sharding, loader.rows)
      state, metrics = programs.train(state, frozen, arrays)
      started = Pending(step, rows, before_BW, metrics, asked_anywhere(request.asked))
      # Read the step before this one, while this one runs.
      if pending is not None:
        stop = report(pending, step + 1)
      pending, done, accuracy = started, step + 1, None
      stop = stop or (alone and request.asked)  # several hosts stop at the same step
      evaluated = evaluate and config.eval.every and done % config.eval.every == 0
      saved = stop or done == steps or done % config.train.checkpoint_every == 0 or evaluated
      if saved:
        stop = report(pending, done) or stop
        pending = None
      if evaluated and not stop:
        with monitor.spending("evaluation"), jax.transfer_guard_device_to_host("allow"):
          accuracy = evaluate(nnx.merge_state(state.params, frozen))
        monitor.log.write("evaluation", step=done, accuracy=accuracy)
      if saved:
        save(done, accuracy)
      if step + 1 == profile_to > profile_from:
        jax.block_until_ready(state.step)
        jax.profiler.stop_trace()
      if stop and done < steps:
        monitor.log.warn(
          "stopped",
          f"Asked to stop: saved after {done} of {steps} steps. The same command goes on.",
          step=done,
        )
        raise SystemExit(EXIT_CODE)
    monitor.log.write("end", step=steps, skipped=monitor.skipped)
  return TrainResult(nnx.merge_state(state.params, frozen), steps)


def _restore(path: str, checkpoints: Checkpoints, state, check) -> Restored | None:
  """What a run goes on from; None for the base model's weights, or random ones by its config.

  1. config.train.restore: a workdir, or one of its checkpoints, where this one has none yet;
  2. the newest good checkpoint of this workdir.
  """
  own = checkpoints.newest(state, check)
  if not path:
    return own
  if own:
    if own.run["restored"] == path:
      return own
    raise ValueError(
      f"config.train.restore is {path!r}, but this workdir has a run that began otherwise; use "
      "another --workdir."
    )
  source, step = as_path(path), None
  if source.parent.name == "checkpoints" and source.name.isdigit():
    source, step = source.parents[1], int(source.name)
  found = None
  if (source / "checkpoints").is_dir():
    found = Checkpoints(source, keep=1).newest(state, check, only=step, keep_damaged=True)
  if found is None:
    raise FileNotFoundError(f"config.train.restore: there is no checkpoint at {path}.")
  return found
