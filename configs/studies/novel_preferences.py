"""Preferences that training never met: a group of dimensions held out, then a few examples of it.

  python -m alignx_jax.studies --config=configs/studies/novel_preferences.py --workdir=runs/novel

Trains eleven times: once without the group, then both on each number of examples.
"""

from ml_collections import ConfigDict

from configs.studies import small_study


def get_config():
  config = small_study.get_config("novel_preferences")
  config.train.log_every = 5
  study = config.study
  with config.unlocked():
    study.policy = "ica"  # or "pba", told P̃ in words
    study.held_out = ("everyday_needs_and_communication",)  # groups of the preference space
    study.examples = (10, 30, 100, 300, 1000)
    study.users = 300  # the most test pairs
    # How each goes on, where it differs from config.study.ica or pba.
    study.tuning = ConfigDict(
      {"aligned": {"train": {"epochs": 3}}, "base": {"train": {"epochs": 3}}}
    )
  return config
