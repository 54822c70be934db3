"""How many users are enough: accuracy by the number of training records, for ICA and PBA.

  python -m alignx_jax.sweep --sweep=configs/sweeps/data_scale.py --workdir=runs/sweep_scale

Expect both to rise, ICA for longer: it has to learn to read personas.
"""

from alignx_jax.sweeps.space import grid, trial
from configs.sweeps import small

RECORDS = (80, 160, 320, 640, 1280)


def get_config():
  return small.get_config()


def get_sweep():
  axes = {"objective.name": ("ica", "pba"), "data.train_records": RECORDS, "seed": range(3)}
  for overrides in grid(axes):
    yield trial(overrides)
