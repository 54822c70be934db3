"""A learned bridge on many simulated users: what it comes to when examples are not the limit.

  python -m alignx_jax.train --config=configs/bridge_simulated.py --workdir=runs/bridge

Its regions hold four of the study's examples.
"""

from configs import study_simulated


def get_config():
  config = study_simulated.get_config()
  config.objective.name = "pba"
  config.bridge.kind = "head"
  config.data.train_records = 24_000
  config.data.test_records = 600
  config.regions.prompt = 128
  config.regions.persona = 1152
  config.regions.parts = 40
  config.regions.response = 128
  config.train.rows = 1
  config.train.checkpoint_every = 500
  return config
