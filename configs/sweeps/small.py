"""What the ready sweeps change: the study's simulated users, few and quickly trained.

A trial takes less than a minute of two slow cores, its evaluation included, and reaches less than
the study with its 6,400 users. Like other sweeps these take any config of the same fields instead.
"""

from alignx_jax.sweeps.options import sweep_options
from configs import study_simulated


def get_config():
  config = study_simulated.get_config()
  with config.unlocked():
    del config.study
    config.sweep = sweep_options()
  config.data.train_records = 320
  config.data.validation_records = 50
  config.data.test_records = 160
  config.train.rows = 2  # more steps than the study has with as many users
  config.train.checkpoint_every = 50
  config.train.log_every = 5
  config.eval.protocols = ("matched",)
  return config
