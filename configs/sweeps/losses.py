"""The loss variants, each at β it is often used with (objectives/losses.py).

  python -m alignx_jax.sweep --sweep=configs/sweeps/losses.py --workdir=runs/sweep_losses

Expect the losses with a reference alike, and SimPO to differ: it has none, and its rewards are
means over a response's tokens.
"""

from alignx_jax.sweeps.space import cross, grid, trial
from configs.sweeps import small

LOSSES = {
  "dpo": {"objective.loss": "sigmoid", "objective.beta": 0.1},
  "cdpo": {"objective.loss": "sigmoid", "objective.beta": 0.1, "objective.label_smoothing": 0.1},
  "ipo": {"objective.loss": "ipo", "objective.beta": 0.1},
  "hinge": {"objective.loss": "hinge", "objective.beta": 0.1},
  "simpo": {"objective.loss": "simpo", "objective.beta": 2.0, "objective.target_margin": 1.0},
}


def get_config():
  return small.get_config()


def get_sweep():
  for loss, fields in LOSSES.items():
    for overrides in cross([fields], grid({"seed": range(3)})):
      yield trial(overrides, {"loss": loss, "seed": overrides["seed"]})
