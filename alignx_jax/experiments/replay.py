"""Steps that were not finite, once more: which rows and examples, which parameters."""

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from alignx_jax.data.rows import Rows
from alignx_jax.experiments.experiment import Experiment, restored_params, training_loader
from alignx_jax.files import as_path
from alignx_jax.models.lora import split_trainable
from alignx_jax.objectives.losses import PreferenceLoss, reference_kind
from alignx_jax.training import mesh as meshes
from alignx_jax.training.bridge import objective_beside
from alignx_jax.training.reference import LogProbs, cached_reference, fingerprint
from alignx_jax.training.run_config import check_run_config
from alignx_jax.training.steps import mean_gradient


def replay(experiment: Experiment, workdir: Path, file: str) -> str:
  """Loss and gradient of each row of the batches that a replay file names, in one process.

  A run that gives up writes the file and saves its state, which none of these steps changed: it
  is looked at by that, wherever the run went on to.

  Returns:
    A line for each row, with its examples; then the parameters whose gradient is not finite.
  Raises:
    FileNotFoundError: there is no such file, or its checkpoint is not kept any more.
    ValueError: another config made the run.
  """
  body = json.loads(as_path(file).read_text(encoding="utf-8"))
  config, mesh, loader = experiment.config, experiment.mesh, training_loader(experiment)
  experiment = dataclasses.replace(experiment, workdir=workdir)
  base = experiment.load_base()
  weights = fingerprint(base)
  check_run_config(config, workdir, body["fingerprint"])
  if reference_kind(config) == "cached":
    log_probs = LogProbs(experiment.model, base, mesh, loader.rows, config.train.head_chunk)
    directory = config.reference.directory or workdir / "reference"
    loader.reference = cached_reference(log_probs, loader, directory, weights)
    del log_probs
  del base  # room for what is restored
  params = restored_params(experiment, body["checkpoint"])
  trained, frozen = split_trainable(params, bridge_alone=config.bridge.alone)
  beside = objective_beside(config, experiment.model, loader, body["steps"])

  @jax.jit
  def look(params, rows, step):
    gradient, metrics = mean_gradient(
      params,
      frozen,
      rows,
      graph=nnx.graphdef(experiment.model),
      loss=PreferenceLoss.of(config.objective),
      chunk=config.train.head_chunk,
      accumulation=1,
      online=reference_kind(config) == "online",
      bridge=beside,
      step=step,
    )
    bad = jax.tree.map(lambda x: jnp.sum(~jnp.isfinite(x)), gradient)
    return metrics["loss"][0] / metrics["loss"][1], optax.tree.norm(gradient), bad

  lines = []
  sharding = meshes.rows_sharding(mesh, loader.rows)
  with jax.set_mesh(mesh):
    for i, lanes in enumerate(body["lanes"]):
      step = body["step"] + i
      rows = next(loader.batches(np.array(lanes, np.int32))).rows
      for b in np.flatnonzero(rows.weight_BE.any(axis=1)):
        alone = jax.device_put(_alone(rows, b), sharding)
        loss, norm, bad = jax.device_get(look(trained, alone, jnp.int32(step)))
        slots = rows.example_BE[b][rows.example_BE[b] >= 0]
        ids = [loader.examples[loader.stream.example(int(slot))].id for slot in slots]
        lines.append(f"step {step} row {b}: loss {loss}, gradient norm {norm}; {', '.join(ids)}")
        for path, count in jax.tree_util.tree_leaves_with_path(bad):
          if count:
            lines.append(f"  {count} not finite in the gradient of {jax.tree_util.keystr(path)}")
  return "\n".join(lines)


def _alone(rows: Rows, b: int) -> Rows:
  """The batch with all other rows empty."""
  alone = jax.tree.map(np.zeros_like, rows)
  alone = alone._replace(example_BE=np.full_like(rows.example_BE, -1))
  for into, array in zip(jax.tree.leaves(alone), jax.tree.leaves(rows), strict=True):
    into[b] = array[b]
  return alone
