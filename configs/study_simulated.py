"""The study on simulated users: one small base, aligned by ICA and by PBA.

  python -m alignx_jax.study --config=configs/study_simulated.py --workdir=runs/study

Runs on a laptop without an accelerator; the README shows what it printed.
"""

from configs import base


def get_config():
  config = base.get_config()
  config.model.weights = "package:alignx_jax/models/simulated_base"
  config.model.remat = False
  config.data.path = "simulated"
  config.data.train_records = 6400
  config.data.test_records = 600
  config.history.policy = "all"
  config.regions.context = 640
  config.regions.response = 96
  config.regions.examples = 4
  config.objective.beta = 0.1
  config.optimizer.learning_rate = 5e-4
  config.train.rows = 4
  config.train.checkpoint_every = 100
  return config
