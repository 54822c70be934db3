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
  config.data.train_records = 1600
  config.data.test_records = 320
  config.history.policy = "all"
  # Evaluated in rows that hold two personas, or four lists of preferences.
  config.regions.context = 720
  config.regions.response = 128
  config.regions.examples = 4
  # With a learned bridge: four examples.
  config.regions.prompt = 128
  config.regions.persona = 1056
  config.regions.parts = 36
  config.objective.beta = 0.1
  config.optimizer.learning_rate = 5e-4
  config.train.rows = 4
  config.train.checkpoint_every = 200
  # Trained in rows that two or three examples fill: attention costs the square of a row.
  two = {"response": 72, "examples": 2}
  head = {"prompt": 64, "persona": 544, "parts": 18}
  with config.unlocked():
    config.study = ConfigDict(
      {
        # Of the test pairs, those on which is measured what a policy makes of few acts.
        "few_acts_pairs": 160,
        "ica": {
          "regions": {"context": 720} | two,
          # Two examples a step: it learns from far fewer users than of four or eight. The others
          # do not.
          "train": {"rows": 1},
          "optimizer": {"learning_rate": 1e-3},
        },
        # To write the chosen response teaches a policy to read preferences, told as text and, far
        # more, as tokens; one that reads a persona it distracts.
        "pba": {
          "regions": {"context": 224, "response": 96, "examples": 3},
          "train": {"rows": 3, "epochs": 2},
          "objective": {"likelihood_weight": 1.0},
        },
        "pba_head": {
          "regions": head | two,
          "train": {"rows": 2},
          "objective": {"likelihood_weight": 1.0},
          "optimizer": {"learning_rate": 7e-4},
          "bridge": {"learning_rate": 4e-3},
        },
      }
    )
  return config
