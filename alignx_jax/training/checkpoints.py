"""Orbax checkpoints of state and data position, as one unit per step."""

from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp


class Checkpoints:
  """The checkpoints of one workdir."""

  def __init__(self, workdir: Path, *, keep: int):
    self._manager = ocp.CheckpointManager(
      (workdir / "checkpoints").absolute(),
      options=ocp.CheckpointManagerOptions(max_to_keep=keep, enable_async_checkpointing=True),
    )

  def latest_step(self) -> int | None:
    return self._manager.latest_step()

  def save(self, step: int, state, lanes_BW: np.ndarray | None = None) -> None:
    """Starts saving a TrainState, and where the loader's stream goes on if it has one."""
    data = {} if lanes_BW is None else {"data": ocp.args.StandardSave({"lanes_BW": lanes_BW})}
    self._manager.save(
      step,
      args=ocp.args.Composite(
        params=ocp.args.StandardSave(state.params),
        optimizer=ocp.args.StandardSave({"step": state.step, "optimizer": state.optimizer}),
        **data,
      ),
    )

  def restore(self, step: int, state):
    """A TrainState in the shapes and shardings of `state`."""
    restored = self._manager.restore(
      step,
      args=ocp.args.Composite(
        params=_restore_like(state.params),
        optimizer=_restore_like({"step": state.step, "optimizer": state.optimizer}),
      ),
    )
    return state._replace(params=restored["params"], **restored["optimizer"])

  def restore_lanes(self, step: int, lanes_BW: np.ndarray) -> np.ndarray:
    """Where the loader's stream goes on, in the shape of `lanes_BW`."""
    args = ocp.args.Composite(data=_restore_like({"lanes_BW": lanes_BW}))
    return np.asarray(self._manager.restore(step, args=args)["data"]["lanes_BW"])

  def restore_params(self, step: int, params):
    """The parameters alone, in the shapes and shardings of `params`."""
    args = ocp.args.Composite(params=_restore_like(params))
    return self._manager.restore(step, args=args)["params"]

  def close(self) -> None:
    """Waits for saves under way."""
    self._manager.wait_until_finished()
    self._manager.close()


def _restore_like(tree):
  return ocp.args.StandardRestore(jax.tree.map(ocp.utils.to_shape_dtype_struct, tree))
