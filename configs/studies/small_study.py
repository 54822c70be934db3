"""What the studies of simulated users share: the policies of configs/study_simulated.py."""

from configs import study_simulated


def get_config(name):
  config = study_simulated.get_config()
  with config.unlocked():
    config.study.name = name  # a function of alignx_jax/experiments/studies.py
    # A folder with runs ica, pba and pba_head of this config, read where they are finished and
    # trained where not; empty: the workdir.
    config.study.runs = ""
  return config
