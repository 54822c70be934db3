"""Adapters of some ranks against all weights, each with learning rates of its own.

  python -m alignx_jax.sweep --sweep=configs/sweeps/lora.py --workdir=runs/sweep_lora

Expect adapters to want the higher learning rates, and higher ranks to come closer to all weights.
Halving (--config.eval.every=25 --config.sweep.halving=3) spares what does badly early.
"""

from alignx_jax.sweeps.space import grid, trial
from configs.sweeps import small

RATES = {"full": (1e-4, 5e-4), "adapter": (5e-4, 2e-3, 8e-3)}


def get_config():
  config = small.get_config()
  config.lora.alpha = 16.0
  return config


def get_sweep():
  for overrides in grid({"lora.rank": (0, 2, 8, 32), "seed": range(3)}):
    for rate in RATES["adapter" if overrides["lora.rank"] else "full"]:
      yield trial(overrides | {"optimizer.learning_rate": rate})
