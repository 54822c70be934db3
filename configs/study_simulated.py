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
  config.data.train_records = 2800
  config.data.test_records = 600
  config.history.policy = "all"
  # Evaluated in rows that hold two personas, or three lists of preferences.
  config.regions.context = 640
  config.regions.response = 96
  config.regions.examples = 4
  # With a learned bridge: three examples.
  config.regions.prompt = 96
  config.regions.persona = 864
  config.regions.parts = 30
  config.objective.beta = 0.1
  config.optimizer.learning_rate = 5e-4
  config.train.rows = 4
  config.train.checkpoint_every = 200
  # Trained in shorter rows: attention costs the square of a row, on a CPU more than padding does.
  one = {"response": 52, "examples": 1}
  head = {"prompt": 40, "persona": 352, "parts": 10}
  with config.unlocked():
    config.study = ConfigDict(
      {
        # Of the test pairs, those on which is measured what a policy makes of few acts.
        "few_acts_pairs": 300,
        "ica": {
          "regions": {"context": 704, "examples": 2},
          "train": {"rows": 2},
          # With four examples a step; at 5e-4 it learns more slowly, and PBA at this not at all.
          "optimizer": {"learning_rate": 1.2e-3},
        },
        "pba": {"regions": {"context": 128} | one, "train": {"rows": 8}},
        "pba_head": {
          "regions": head | one,
          "train": {"rows": 4},
          "optimizer": {"learning_rate": 7e-4},
          "bridge": {"learning_rate": 4e-3},
        },
      }
    )
  return config
