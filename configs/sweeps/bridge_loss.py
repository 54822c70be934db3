"""The learned bridge: λ of its label loss, and how long the policy reads labels (teacher forcing).

  python -m alignx_jax.sweep --sweep=configs/sweeps/bridge_loss.py --workdir=runs/sweep_bridge

4,800 users, as the head learns little from fewer: minutes a trial on two cores. Expect the head
without its label loss, λ = 0, at chance.
"""

from alignx_jax.sweeps.space import grid, trial
from configs.sweeps import small

FORCING = {"never": (0.0, 0.0), "fading": (1.0, 0.0), "always": (1.0, 1.0)}


def get_config():
  config = small.get_config()
  config.objective.name = "pba"
  config.bridge.kind = "head"
  config.train.rows = 1
  config.data.train_records = 4800
  config.data.validation_records = 200
  return config


def get_sweep():
  for values in grid({"label_weight": (0.0, 0.1, 0.3, 1.0), "forcing": FORCING, "seed": range(3)}):
    overrides = {
      "bridge.label_weight": values["label_weight"],
      "bridge.forcing": FORCING[values["forcing"]],
      "seed": values["seed"],
    }
    yield trial(overrides, values)
