"""β and the learning rate, in runs of seconds: a first sweep, to read in a notebook.

python -m alignx_jax.sweep --sweep=configs/sweeps/beta_and_rate.py --workdir=runs/sweep_rate
"""

from alignx_jax.sweeps.space import grid, trial
from configs.sweeps import small


def get_config():
  config = small.get_config()
  config.objective.name = "pba"
  config.regions.update(context=128, response=52, examples=1)
  config.data.update(train_records=64, validation_records=8, test_records=100)
  config.train.rows = 8
  return config


def get_sweep():
  knobs = {"objective.beta": (0.03, 0.1, 0.5), "optimizer.learning_rate": (3e-5, 3e-4)}
  for overrides in grid(knobs | {"seed": range(3)}):
    yield trial(overrides)
