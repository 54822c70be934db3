"""Orbax checkpoints: state, data position and what made them, one unit for each step.

A checkpoint is written beside its place and renamed when it is whole. It carries a checksum of
each of its arrays, over their values, so what is read is compared with what was saved whatever
the mesh, the number of hosts or the file system. One that is damaged is set aside, named, and
the one before it taken. One that cannot be read for another reason (a failing disk, no memory)
may be whole: that stops the run.
"""

import contextlib
import dataclasses
import hashlib
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp
from absl import logging
from orbax.checkpoint import checkpoint_managers as policies

from alignx_jax.files import as_path, is_remote, move
from alignx_jax.training import hosts
from alignx_jax.training.checksums import checksums


class Restored(NamedTuple):
  """A checkpoint that was read.

  Attributes:
    state: what was asked for.
    run: what `save` was given as such.
  """

  step: int
  state: Any
  run: dict


class Checkpoints:
  """The checkpoints of one workdir: the last `keep`, every `every`-th step's, and the best."""

  def __init__(self, workdir: Path, *, keep: int, every: int = 0):
    """
    Args:
      every: steps; 0 for none.
    """
    kept = [policies.LatestN(keep)]
    if every:
      kept.append(policies.EveryNSteps(every))
    self._accuracies = {}  # of each step's checkpoint; None where it was not evaluated
    kept.append(_Best(self._accuracies))
    self.directory = as_path(workdir) / "checkpoints"
    if not is_remote(workdir):
      self.directory = self.directory.absolute()
    self._manager = ocp.CheckpointManager(
      self.directory,
      options=ocp.CheckpointManagerOptions(
        preservation_policy=policies.AnyPreservationPolicy(kept),
        enable_async_checkpointing=True,
      ),
    )

  def steps(self) -> list[int]:
    """Steps there are checkpoints of, ascending."""
    return sorted(self._manager.all_steps())

  def save(self, step: int, state, run: dict, *, accuracy: float | None = None) -> None:
    """Starts saving a TrainState; waits for the save before it.

    Args:
      run: what else belongs to it, as JSON can hold it.
      accuracy: by which the best checkpoint is kept.
    Raises:
      OSError: this or the last one could not be written.
    """
    parts = _parts(state)
    self._read_accuracies()
    self._accuracies[step] = accuracy
    body = {"run": run, "checksums": {name: checksums(part) for name, part in parts.items()}}
    body["accuracies"] = [[step, self._accuracies[step]] for step in sorted(self._accuracies)]
    items = {name: ocp.args.StandardSave(part) for name, part in parts.items()}
    items["run"] = ocp.args.JsonSave(body | {"digest": _digest(body)})
    with self._told(f"The checkpoint of step {step}"):
      self._manager.save(step, args=ocp.args.Composite(**items), force=True)

  def newest(
    self,
    state,
    check: Callable[[dict], None] = lambda run: None,
    *,
    only: int | None = None,
    keep_damaged: bool = False,
  ) -> Restored | None:
    """The newest good checkpoint, in the shapes and shardings of a TrainState; None if none is.

    Those after it are damaged: they are moved to `damaged/`, with a warning that names them.

    Args:
      check: raises if a run cannot go on from here.
      only: a step that alone is looked at.
      keep_damaged: leave them where they are.
    Raises:
      ValueError: there are checkpoints and every one is damaged.
      OSError: one could not be read, which is no sign of damage; nothing is moved.
    """
    steps = [step for step in self.steps() if only in (None, step)]
    parts = _parts(state)
    found = self._newest(steps, parts, check, aside=not keep_damaged)
    return found and found._replace(
      state=state._replace(params=found.state["params"], **found.state["optimizer"])
    )

  def check_newest(self, check: Callable[[dict], None]) -> None:
    """Calls `check` with what the newest checkpoint that says it says of its run, if any does."""
    for step in reversed(self.steps()):
      body = self._try(step, self._read_run)
      if not isinstance(body, _Damage):
        check(body["run"])
        return

  def newest_params(self, params, *, only: int | None = None) -> Restored | None:
    """Likewise, the parameters alone; what is damaged is left where it is."""
    steps = [step for step in self.steps() if only in (None, step)]
    found = self._newest(steps, {"params": params}, lambda run: None, aside=False)
    return found and found._replace(state=found.state["params"])

  def _newest(self, steps, like, check, *, aside):
    damaged = []
    for step in reversed(steps):
      body = self._try(step, self._read_run)
      if not isinstance(body, _Damage):
        check(body["run"])
        found = self._read(step, like, body)
      else:
        found = body
      if not isinstance(found, _Damage):
        # Only now: without a good one the next start is to find what this one found.
        for step_damaged in damaged if aside else ():
          self._set_aside(step_damaged)
        return Restored(step, found, body["run"])
      logging.warning("The checkpoint of step %d is damaged: %s.", step, found.reason)
      damaged.append(step)
    if steps:
      raise ValueError(
        f"Every checkpoint in {self.directory.parent} is damaged ({', '.join(map(str, steps))}); "
        "they are kept. Use another --workdir to start anew."
      )
    return None

  def lacks_accuracy(self, step: int) -> bool:
    """Whether there is a checkpoint of this step that was saved without being evaluated."""
    self._read_accuracies()
    return step in self.steps() and self._accuracies[step] is None

  def set_accuracy(self, step: int, accuracy: float) -> None:
    """Makes up for that: the checkpoints after it say so."""
    self._accuracies[step] = accuracy

  def _read_accuracies(self):
    """What the checkpoints of earlier starts say of theirs and of those before them."""
    unread = [step for step in self.steps() if step not in self._accuracies]
    for step in unread:
      self._accuracies[step] = None
    for step in unread:
      body = self._try(step, self._read_run)
      known = [] if isinstance(body, _Damage) else body.get("accuracies", [])
      self._accuracies |= {of: accuracy for of, accuracy in known if accuracy is not None}

  def _read_run(self, step):
    body = dict(ocp.JsonCheckpointHandler().restore(self.directory / str(step) / "run"))
    if body.pop("digest", None) != _digest(body):
      raise ValueError("what it says of its run has changed")
    return body

  def _read(self, step, like, body):
    # Not by the manager, whose hosts wait for each other: one that finds damage does not come.
    handler = ocp.StandardCheckpointHandler()
    item = lambda step, name: self.directory / str(step) / name
    read = lambda step: {
      name: handler.restore(item(step, name), args=_restore_like(part))
      for name, part in like.items()
    }
    parts = self._try(step, read)
    if isinstance(parts, _Damage):
      return parts
    for name in like:
      sums = body["checksums"][name]
      wrong = [key for key, value in checksums(parts[name]).items() if sums.get(key) != value]
      if wrong:
        return _Damage(f"{len(wrong)} arrays differ from what was saved, as {name}{wrong[0]}")
    return parts

  def _try(self, step, read):
    """What is read of a step; or the damage, if there is any for some process.

    Raises:
      OSError: some process could not read it, which is no sign of damage.
    """
    result, failure = None, None
    try:
      result = read(step)
    except Exception as error:
      reason = str(error).strip().splitlines() or [""]
      result = _Damage(f"{type(error).__name__}: {reason[0][:200]}")
      failure = None if _shows_damage(error) else error
    worst = hosts.largest(2 if failure else int(isinstance(result, _Damage)))
    if worst == 2:
      told = result.reason if failure else "another host says why in its log"
      raise OSError(
        f"The checkpoint of step {step} in {self.directory} could not be read ({told}). Nothing "
        "shows that it is damaged, so it is not skipped; mend that and run the same command again."
      ) from failure
    if worst and not isinstance(result, _Damage):
      return _Damage("another host cannot read it")
    return result

  def _set_aside(self, step: int) -> None:
    if hosts.is_first():
      source = self.directory / str(step)
      target = self.directory.parent / "damaged" / str(step)
      while target.exists():
        target = target.with_name(f"{target.name}_again")
      move(source, target)
    hosts.all_true(True)  # all see it gone
    self._manager.reload()

  def reached_preemption(self, step: int) -> bool:
    """Whether JAX has noticed that a host is to go, and this is the step all are to save.

    Several processes call it at each step. A signal that StopRequest takes JAX does not see.
    """
    return self._manager.reached_preemption(step)

  def close(self) -> None:
    """Waits for saves under way.

    Raises:
      OSError: one could not be written.
    """
    with self._told("A checkpoint"):
      self._manager.wait_until_finished()
    self._manager.close()

  @contextlib.contextmanager
  def _told(self, what: str):
    """Turns what a library raises when it cannot write into one sentence."""
    try:
      yield
    except Exception as error:
      steps = self.steps()
      last = f"The last good one is of step {steps[-1]}" if steps else "There is none yet"
      known = ("No space left on device", "Read-only file system", "Permission denied")
      reason = next((text for text in known if text in str(error)), str(error).strip()[:300])
      raise OSError(
        f"{what} could not be written to {self.directory}: {reason}. {last}; mend that and run the "
        "same command again."
      ) from error


@dataclasses.dataclass
class _Best(policies.PreservationPolicy):
  """Keeps the checkpoint of the highest accuracy, of several such the newest."""

  accuracies: dict[int, float | None]

  def should_preserve(self, checkpoints, *, context) -> list[bool]:
    known = [c.step for c in checkpoints if self.accuracies.get(c.step) is not None]
    best = max(known, key=lambda step: (self.accuracies[step], step), default=None)
    return [c.step == best for c in checkpoints]


class _Damage(NamedTuple):
  reason: str


# What it raises to read files that are cut short, gone or malformed,
_DAMAGE = AttributeError, FileNotFoundError, LookupError, TypeError, ValueError
# and how TensorStore, which raises ValueError for all that happens, then begins.
_STATUSES = "DATA_LOSS", "FAILED_PRECONDITION", "INVALID_ARGUMENT", "NOT_FOUND", "OUT_OF_RANGE"


def _shows_damage(error: BaseException) -> bool:
  while type(error) is Exception and error.__cause__:  # Orbax's, around what happened
    error = error.__cause__
  status = re.match(r"([A-Z_]+): ", str(error))
  return isinstance(error, _DAMAGE) and (status is None or status[1] in _STATUSES)


def _parts(state) -> dict:
  """A TrainState as items that can be read by themselves."""
  optimizer = {"step": state.step, "optimizer": state.optimizer}
  if state.group_weights is not None:
    optimizer["group_weights"] = state.group_weights
  return {"params": state.params, "optimizer": optimizer}


def _restore_like(tree):
  return ocp.args.StandardRestore(jax.tree.map(ocp.utils.to_shape_dtype_struct, tree))


def _digest(body: dict) -> str:
  text = json.dumps(body, sort_keys=True)
  return hashlib.sha256(text.encode()).hexdigest()


def lanes_to_json(lanes_BW: np.ndarray) -> list[list[int]]:
  """Where the loader's stream goes on, without the empty places."""
  return [lane_W[lane_W >= 0].tolist() if lane_W[0] >= 0 else [] for lane_W in lanes_BW]


def lanes_from_json(lanes: list[list[int]], like_BW: np.ndarray) -> np.ndarray:
  """The inverse, in the shape of `like_BW`."""
  lanes_BW = np.full_like(like_BW, -1)
  for row, lane in zip(lanes_BW, lanes, strict=True):
    row[: len(lane)] = lane
  return lanes_BW
