"""Loss and gradient of one packed batch on a mesh, saved: run by tests/test_mesh.py.

  python -m tests.one_step OUTPUT.npz REPLICA FSDP TENSOR CONTEXT …

Several meshes may follow one another: arrays of mesh i are named "i/…". As one of several
processes, by the variables that training/hosts.py reads.
"""

import sys

import jax
import numpy as np
from flax import nnx

from alignx_jax.data.rows import Regions
from alignx_jax.models.decoder import Decoder
from alignx_jax.models.presets import get_architecture
from alignx_jax.training import hosts, steps
from alignx_jax.training import mesh as meshes
from alignx_jax.training.optimizer import make_optimizer
from configs import base
from tests.packing import pack

ROWS = 8
REGIONS = Regions(context=64, response=16, examples=3)


def make_rows():
  """Fourteen examples of random ids and references, the last rows empty."""
  rng = np.random.default_rng(0)
  ids = lambda low, high: rng.integers(320, size=rng.integers(low, high)).tolist()
  examples = [(ids(5, 30), ids(2, 8), ids(2, 8)) for _ in range(14)]
  rows = pack(examples, REGIONS, rows=ROWS)
  return rows._replace(reference_BNE=rng.normal(size=rows.reference_BNE.shape).astype(np.float32))


def one_step(sizes) -> dict[str, np.ndarray]:
  """Loss, gradients and the parameters after one update on a mesh of these sizes."""
  config = base.get_config()
  config.train.update(rows=ROWS, head_chunk=8)
  config.optimizer.learning_rate = 1e-2
  mesh = meshes.make_mesh(dict(zip(meshes.AXES, sizes, strict=True)), _devices(sizes))
  make = lambda: Decoder(get_architecture("tiny8"), rngs=nnx.Rngs(0))
  model = nnx.eval_shape(make)
  programs = steps.make_steps(config, model, mesh, REGIONS, make_optimizer(config.optimizer, 10))
  shapes = steps.param_shapes(model, mesh)
  shardings = jax.tree.map(lambda x: x.sharding, shapes)
  params = jax.jit(lambda: nnx.state(make()), out_shardings=shardings)()
  sharding = programs.rows.tokens_BL.sharding
  own = hosts.own_rows(sharding, ROWS)
  rows = hosts.to_devices(jax.tree.map(lambda x: x[own], make_rows()), sharding, ROWS)
  options = {"beta": 0.1, "chunk": 8, "accumulation": 1, "online": False}

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


def main(output, *numbers):
  hosts.connect()
  sizes = np.array(numbers, int).reshape(-1, len(meshes.AXES)).tolist()
  arrays = {f"{i}/{k}": v for i, size in enumerate(sizes) for k, v in one_step(size).items()}
  if hosts.is_first():
    np.savez(output, **arrays)


if __name__ == "__main__":
  main(*sys.argv[1:])
