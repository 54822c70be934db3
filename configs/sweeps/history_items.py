"""How much of a user one must know: 0 to all of the history's items, in training and test.

  python -m alignx_jax.sweep --sweep=configs/sweeps/history_items.py --workdir=runs/sweep_history

Expect chance without any, and more with each item. PBA as text has no P̃ without items.
"""

from alignx_jax.sweeps.space import grid, trial
from configs.sweeps import small

ITEMS = (0, 1, 2, 4, 8)


def get_config():
  config = small.get_config()
  config.history.policy = "fixed"
  config.history.kinds = ("ugc", "pair")
  return config


def get_sweep():
  axes = {"objective.name": ("ica", "pba"), "history.items": ITEMS, "seed": range(3)}
  for overrides in grid(axes):
    if overrides["objective.name"] == "ica" or overrides["history.items"]:
      yield trial(overrides)
