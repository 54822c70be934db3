"""The study on simulated users: one small base, aligned by ICA and by PBA.

  python -m alignx_jax.study --config=configs/study_simulated.py --workdir=runs/study

Runs on a laptop without an accelerator; the README shows what it printed.
"""

from ml_collections import ConfigDict

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
  # With a learned bridge: three examples to a row of 1,512 tokens.
  config.regions.prompt = 96
  config.regions.persona = 864
  config.regions.parts = 30
  config.objective.beta = 0.1
  config.optimizer.learning_rate = 5e-4
  config.train.rows = 4
  config.train.checkpoint_every = 100
  with config.unlocked():
    config.study = ConfigDict({"head_rows": 1})  # train.rows with a learned bridge
  return config
