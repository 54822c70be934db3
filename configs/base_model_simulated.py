"""The base model of the simulated study: 1.1 M parameters that can read their context.

  python -m alignx_jax.pretrain_base --config=configs/base_model_simulated.py --workdir=runs/base

Ten minutes on two cores.
"""

from ml_collections import ConfigDict

from configs import study_simulated


def get_config():
  config = ConfigDict()
  config.seed = 0
  config.preset = "simulated_base"
  config.tokenizer = ConfigDict({"vocab_size": 2048, "documents": 8000})
  # Rows of `length` tokens; `repeats` is the share of steps on random repeating tokens.
  config.phases = (
    ConfigDict({"steps": 1200, "rows": 32, "length": 64, "repeats": 1.0}),
    ConfigDict({"steps": 4000, "rows": 8, "length": 128, "repeats": 0.05}),
    ConfigDict({"steps": 1200, "rows": 4, "length": 256, "repeats": 0.05}),
    ConfigDict({"steps": 1000, "rows": 2, "length": 640, "repeats": 0.0}),
  )
  config.muon_learning_rate = 0.01
  config.adam_learning_rate = 6e-3
  config.warmup = 100  # steps
  config.log_every = 20  # steps
  config.checkpoint_every = 500  # steps
  config.study = study_simulated.get_config()  # on whose test pairs the base is measured
  return config
