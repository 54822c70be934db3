"""alignx_jax's own training step, for tests/benchmarks/train_step.py."""

import time

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from turns import Turns

from alignx_jax.data.rows import Regions, Rows
from alignx_jax.models.lora import split_trainable
from alignx_jax.models.pretrained import load_decoder
from alignx_jax.training import mesh as meshes
from alignx_jax.training.optimizer import make_optimizer
from alignx_jax.training.reference import LogProbs
from alignx_jax.training.steps import make_steps
from configs import base


def matmul_flops(size: int = 2048, rounds: int = 5) -> float:
  """FLOP/s of a product of square float32 matrices, the best of some."""
  product = jax.jit(jnp.matmul)
  x_SS = jax.random.normal(jax.random.key(0), (size, size))
  product(x_SS, x_SS).block_until_ready()
  seconds = []
  for _ in range(rounds):
    started = time.perf_counter()
    product(x_SS, x_SS).block_until_ready()
    seconds.append(time.perf_counter() - started)
  return 2 * size**3 / min(seconds)


def main():
  turns = Turns()
  batch = turns.batch
  config = base.get_config()
  config.optimizer.update(batch["optimizer"], warmup_share=0.0, final_share=1.0)
  config.objective.beta = batch["beta"]
  with np.load(turns.directory / "rows.npz") as arrays:
    rows = Rows(**arrays)
  # A row at a time, as configs/smollm2_p_soups_ica.py has it.
  config.train.update(rows=len(rows.weight_BE), accumulation=len(rows.weight_BE))
  mesh = meshes.make_mesh(None, jax.devices()[:1])
  model = load_decoder(
    turns.directory / "weights",
    shardings=lambda params: meshes.param_shardings(params, mesh),
    remat=batch["remat"],
  )
  params, model = nnx.state(model), nnx.eval_shape(lambda: model)
  log_probs = LogProbs(model, params, mesh, config.train.rows, config.train.head_chunk)
  of_rows = lambda: jax.device_get(log_probs(rows))
  reference_BEN, example_BE = of_rows()
  started = time.perf_counter()
  of_rows()
  turns.tell(
    log_probs=reference_BEN[example_BE >= 0].tolist(),
    reference_seconds=time.perf_counter() - started,
    matmul_flops=matmul_flops(),
  )
  rows = rows._replace(reference_BNE=reference_BEN.swapaxes(1, 2))
  rows = jax.device_put(rows, meshes.rows_sharding(mesh, config.train.rows))
  optimizer = make_optimizer(config.optimizer, 1)
  programs = make_steps(config, model, mesh, Regions(**batch["regions"]), optimizer)
  trained, frozen = split_trainable(params, bridge_alone=False)
  with jax.set_mesh(mesh):
    state = programs.init(trained)
    while turns.wait():
      state, metrics = programs.train(state, frozen, rows)
      loss = np.divide(*jax.device_get(metrics["loss"]))
      jax.block_until_ready(state)
      turns.done(loss)


if __name__ == "__main__":
  main()
