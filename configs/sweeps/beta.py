"""DPO's β: how far a policy may move from its reference.

python -m alignx_jax.sweep --sweep=configs/sweeps/beta.py --workdir=runs/sweep_beta
"""

from alignx_jax.sweeps.space import grid, trial
from configs.sweeps import small


def get_config():
  return small.get_config()


def get_sweep():
  for overrides in grid({"objective.beta": (0.01, 0.03, 0.1, 0.3, 1.0), "seed": range(3)}):
    yield trial(overrides)
