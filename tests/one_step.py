"""Loss and gradient of one packed batch on a mesh, saved: run by tests/test_mesh.py.

  python -m tests.one_step OUTPUT.npz OBJECTIVE REPLICA FSDP TENSOR CONTEXT …

The objective is "ica", or "pba" with a learned bridge. Several meshes may follow one another:
arrays of mesh i are named "i/…". As one of several processes, by the variables that
training/hosts.py reads.
"""

import dataclasses
import sys

import jax
import numpy as np
from flax import nnx

from alignx_jax.data.rows import Regions, Tokenised, TokenisedPart, lay_out, stack
from alignx_jax.models.bridge import add_bridge
from alignx_jax.models.decoder import Decoder
from alignx_jax.models.presets import get_architecture
from alignx_jax.objectives.losses import PreferenceLoss
from alignx_jax.objectives.pba import BridgeObjective
from alignx_jax.personas.prompts import PART_KINDS
from alignx_jax.training import hosts, steps
from alignx_jax.training import mesh as meshes
from alignx_jax.training.optimizer import make_optimizer
from configs import base
from tests.packing import pack

ROWS = 8
REGIONS = Regions(context=64, response=16, examples=3)
DIMENSIONS = 8
BRIDGED = dataclasses.replace(REGIONS, persona=96, parts=8)
BRIDGE = BridgeObjective(
  label_weight=0.1,
  act_weight=1.0,
  class_weights=(2.0, 0.5, 2.0),
  forcing=(0.5, 0.5),
  forcing_steps=1.0,
  dpo_gradient=True,
  seed=0,
)


def make_rows(bridged: bool):
  """Fourteen examples of random ids and references, the last rows empty."""
  rng = np.random.default_rng(0)
  ids = lambda low, high: rng.integers(320, size=rng.integers(low, high)).tolist()
  examples = [(ids(5, 30), ids(2, 8), ids(2, 8)) for _ in range(14)]
  rows = with_personas(examples, ids, rng) if bridged else pack(examples, REGIONS, rows=ROWS)
  return rows._replace(reference_BNE=rng.normal(size=rows.reference_BNE.shape).astype(np.float32))


def with_personas(examples, ids, rng):
  """The examples by twos, with personas of one to four parts; some have no labels, or in part."""

  def labels(least):
    return None if rng.random() < 0.3 else rng.integers(least, 3, size=DIMENSIONS)

  def persona():
    count = rng.integers(1, 5)
    return tuple(
      TokenisedPart(ids(2, 12), rng.integers(len(PART_KINDS)), labels(0)) for _ in range(count)
    )

  examples = [Tokenised(*parts, 0, persona(), labels(-1)) for parts in examples]
  return stack(
    [
      lay_out(
        examples[i : i + 2],
        BRIDGED,
        indices=range(i, i + len(examples[i : i + 2])),
        dimensions=DIMENSIONS,
      )
      for i in range(0, 2 * ROWS, 2)
    ]
  )


def make_model(bridged: bool) -> Decoder:
  """A tiny model; its bridge's tables are as far from 0 as a trained one's."""
  model = Decoder(get_architecture("tiny8"), rngs=nnx.Rngs(0))
  if bridged:
    add_bridge(model, DIMENSIONS, size=4, rngs=nnx.Rngs(1))
    for i, name in enumerate(("token_PKD", "pole_PQD", "bias_PK", "kind_score", "kind_value_V")):
      table = getattr(model.bridge, name)
      table[...] = jax.random.normal(jax.random.key(i), table.shape)
  return model


def one_step(sizes, *, bridged: bool) -> dict[str, np.ndarray]:
  """Loss, gradients and the parameters after one update on a mesh of these sizes."""
  config = base.get_config()
  config.train.update(rows=ROWS, head_chunk=8)
  config.optimizer.learning_rate = 1e-2
  mesh = meshes.make_mesh(dict(zip(meshes.AXES, sizes, strict=True)), _devices(sizes))
  make = lambda: make_model(bridged)
  model = nnx.eval_shape(make)
  regions, bridge = (BRIDGED, BRIDGE) if bridged else (REGIONS, None)
  optimizer = make_optimizer(config.optimizer, 10, bridge_learning_rate=1e-2 if bridged else 0.0)
  programs = steps.make_steps(config, model, mesh, regions, optimizer, bridge)
  shapes = steps.param_shapes(model, mesh)
  shardings = jax.tree.map(lambda x: x.sharding, shapes)
  params = jax.jit(lambda: nnx.state(make()), out_shardings=shardings)()
  sharding = programs.rows.tokens_BL.sharding
  own = hosts.own_rows(sharding, ROWS)
  rows = hosts.to_devices(jax.tree.map(lambda x: x[own], make_rows(bridged)), sharding, ROWS)
  options = {
    "loss": PreferenceLoss(),
    "chunk": 8,
    "accumulation": 1,
    "online": False,
    "bridge": bridge,
  }

  def gradient(params, rows):
    found = steps.mean_gradient(params, nnx.State({}), rows, graph=nnx.graphdef(model), **options)
    return jax.lax.with_sharding_constraint(found, meshes.replicated(mesh))

  with jax.set_mesh(mesh):
    found, metrics = jax.jit(gradient)(params, rows)
    state, _ = programs.train(programs.init(params), nnx.State({}), rows)
    after = jax.jit(lambda x: x, out_shardings=meshes.replicated(mesh))(state.params)
  arrays = {"loss": np.divide(*jax.device_get(metrics["loss"]))}
  for name, tree in (("gradient", found), ("after", after)):
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
      arrays[name + jax.tree_util.keystr(path)] = np.asarray(leaf)
  return arrays


def _devices(sizes):
  return jax.devices()[: int(np.prod(sizes))]


def main(output, objective, *numbers):
  hosts.connect()
  sizes = np.array(numbers, int).reshape(-1, len(meshes.AXES)).tolist()
  arrays = {
    f"{i}/{name}": value
    for i, size in enumerate(sizes)
    for name, value in one_step(size, bridged=objective == "pba").items()
  }
  if hosts.is_first():
    np.savez(output, **arrays)


if __name__ == "__main__":
  main(*sys.argv[1:])
