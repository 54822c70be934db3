"""The training loop: mesh, model, data, reference, step, checkpoints; top to bottom."""

import contextlib
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax
from absl import logging
from flax import nnx

from alignx_jax.data.loader import PACKING, Loader
from alignx_jax.files import as_path, is_remote, write_text
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
from alignx_jax.training.run_config import (
  check_config,
  code_version,
  run_record,
  save_run_config,
)
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
  load: Callable[[], nnx.State],
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
    load: gives the parameters of the policy's start, and of the frozen reference; called once
      the workdir is held and all hosts agree.
    mesh: on which the parameters lie.
    evaluate: all parameters to alignment accuracy, every `eval.every` steps.
    ideal_seconds: see Monitor.
  Raises:
    ValueError: the workdir holds a run of another config; or the data gives too few steps.
    FloatingPointError: steps in a row are not finite; names them and the examples.
    OSError: the workdir cannot be written to, or a live run writes to it.
    RuntimeError: another process did not come in time, or to a step; names it.
    SystemExit: asked to stop by SIGTERM or Ctrl-C; the state is saved.
  """
  began = time.perf_counter()
  with in_use(workdir):
    return _train(
      config, as_path(workdir), model, load, mesh, loader, evaluate, ideal_seconds, began
    )


def _train(
  config, workdir, model, load, mesh, loader, evaluate, ideal_seconds, began
) -> TrainResult:
  patience = config.train.barrier_seconds
  hosts.barrier("start", patience)
  hosts.check_same(
    lambda: {
      "config": repr(config.to_dict()),
      "code": code_version(),
      "data, tokenizer and prompts": cache_key(loader, model, ""),
      "mesh": repr(dict(mesh.shape)),
    }
  )

  # ------------------------------------------------------------------ reference and data
  params = load()
  log_probs = LogProbs(model, params, mesh, loader.rows, config.train.head_chunk)
  weights = fingerprint(params)
  key = cache_key(loader, model, weights)
  run_key = f"{key}-{PACKING}"
  record = run_record(config, run_key, loader.formatting)
  checkpoints = Checkpoints(
    workdir, keep=config.train.keep_checkpoints, every=config.train.keep_every
  )
  source = _absolute(config.train.restore)

  def check(run, where=workdir):
    check_config(config, run["config"], str(where), run_key)
    if source and where is workdir and run["restored"] != source:
      raise ValueError(
        f"config.train.restore is {source}, and {workdir} has a run that did not begin there; use "
        "another --workdir, or leave it out to go on with that run."
      )

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
  restored = _restore(source, checkpoints, programs.state, check)
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
  # Where the run began, for all its checkpoints, whether or not the command still says so.
  record |= {"restored": source or (restored.run["restored"] if restored else "")}

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
      began=began,
    )
    stack.callback(monitor.close)
    stack.enter_context(jax.set_mesh(mesh))
    stack.enter_context(jax.transfer_guard_device_to_host("disallow"))
    request = StopRequest()
    asked_anywhere = any_host()
    monitor.log.write("start", step=first, steps=steps, version=record["version"])
    pending, stop, tracing, alone = None, False, False, jax.process_count() == 1
    profile_from, profile_to = config.train.profile

    def save(done, accuracy=None):
      hosts.barrier(f"the checkpoint of step {done}", patience)
      with monitor.spending("checkpoint"), jax.transfer_guard_device_to_host("allow"):
        run = record | {"lanes": lanes_to_json(gather(lanes_BW))}
        checkpoints.save(done, state, run, accuracy=accuracy)
      monitor.log.write("save", step=done)
      monitor.sync()

    def measured(done):
      with monitor.spending("evaluation"), jax.transfer_guard_device_to_host("allow"):
        accuracy = evaluate(nnx.merge_state(state.params, frozen))
      monitor.log.write("evaluation", step=done, accuracy=accuracy)
      return accuracy

    def report(pending, done):
      hosts.wait(pending.metrics, f"step {pending.step}", patience)
      try:
        return monitor.report(pending)
      except FloatingPointError:
        save(done)  # what is to be replayed with: no step after the bad ones was begun
        raise

    evaluates = lambda done: evaluate and config.eval.every and done % config.eval.every == 0
    if restored and evaluates(first) and checkpoints.lacks_accuracy(first):
      checkpoints.set_accuracy(first, measured(first))
    hosts.barrier("the first step", patience)
    for step in range(first, steps):
      if profile_from <= step < profile_to and not tracing:
        jax.profiler.start_trace(str(monitor.directory / "profile"))
        tracing = True
      with monitor.spending("data"):
        before_BW = lanes_BW
        rows, lanes_BW = next(batches)
        arrays = hosts.to_devices(rows, rows_sharding, loader.rows)
      with monitor.spending("setup") if step == first else contextlib.nullcontext():
        state, metrics = programs.train(state, frozen, arrays)  # the first time compiles it
      if step == first:
        stack.enter_context(request)  # before, there is nothing to save: a signal ends at once
      started = Pending(step, rows, before_BW, metrics, asked_anywhere(request.asked))
      # Read the step before this one, while this one runs.
      if pending is not None:
        stop = report(pending, step + 1)
      pending, done, accuracy = started, step + 1, None
      stop = stop or (alone and request.asked)  # several hosts stop at the same step
      stop = checkpoints.reached_preemption(done) or stop
      evaluated = evaluates(done)
      saved = stop or done == steps or done % config.train.checkpoint_every == 0 or evaluated
      if saved or monitor.may_give_up:
        stop = report(pending, done) or stop
        pending = None
      if evaluated and not stop:  # else the next start does
        accuracy = measured(done)
        stop = alone and request.asked
      if saved:
        save(done, accuracy)
      if tracing and (stop or done in (profile_to, steps)):
        jax.block_until_ready(state.step)
        jax.profiler.stop_trace()
        tracing = False
      if saved and stop and done < steps:
        monitor.log.warn(
          "stopped",
          f"Asked to stop: saved after {done} of {steps} steps. The same command goes on.",
          step=done,
        )
        raise SystemExit(EXIT_CODE)
    monitor.log.write("end", step=steps, skipped=monitor.skipped, **monitor.totals())
  return TrainResult(nnx.merge_state(state.params, frozen), steps)


def _restore(source: str, checkpoints: Checkpoints, state, check) -> Restored | None:
  """What a run goes on from, the first there is of these:

  1. `source`, config.train.restore: a checkpoint, or of a workdir the newest good one. It counts
     until this workdir has a checkpoint of the run that began there: the same command again goes
     on with that one. A workdir with a run that began elsewhere is refused (`check`), not
     overwritten;
  2. the newest good checkpoint of this workdir;
  3. None: the weights of config.model, pretrained or, of a preset, fresh.
  """
  own = checkpoints.newest(state, check)
  if own or not source:
    return own
  directory, step = as_path(source), None
  if directory.parent.name == "checkpoints" and directory.name.isdigit():
    directory, step = directory.parents[1], int(directory.name)
  found = None
  if (directory / "checkpoints").is_dir():
    check_source = lambda run: check(run, directory)
    others = Checkpoints(directory, keep=1)
    found = others.newest(state, check_source, only=step, keep_damaged=True)
    others.close()
  if found is None:
    raise FileNotFoundError(f"config.train.restore: there is no checkpoint at {source}.")
  return found


def _absolute(path: str) -> str:
  """A path as it is the same from any directory."""
  return path if not path or is_remote(path) else os.path.abspath(path)
