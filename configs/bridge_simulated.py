"""A learned bridge on many simulated users: what it comes to when examples are not the limit.

  python -m alignx_jax.train --config=configs/bridge_simulated.py --workdir=runs/bridge

Trained as the study trains its bridge.
"""

from configs import study_simulated


def get_config():
  config = study_simulated.get_config()
  config.update(config.study.pba_head)
  config.objective.name = "pba"
  config.bridge.kind = "head"
  config.data.train_records = 24_000
  config.data.test_records = 600
  config.train.checkpoint_every = 1000
  return config
