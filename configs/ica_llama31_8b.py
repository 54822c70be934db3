"""Llama-3.1-8B-Instruct aligned in context (ICA) on AlignX: the paper's run, on 64 chips.

  python -m alignx_jax.train --config=configs/ica_llama31_8b.py \\
    --config.model.weights=DIRECTORY_OF_THE_MODEL --config.data.path=data/train --workdir=…

on v5e:8x8, v5p:4x4x4 or v6e:8x8. What the program needs there, without a TPU:

  python -m alignx_jax.compile --config=configs/ica_llama31_8b.py --topology=v5e:8x8 --workdir=…

Two slices: --config.mesh.replica=2 --config.mesh.tensor=4. Learning rate, β, schedule and
batch are the paper's (arXiv 2503.15463): some 128 examples a step, one epoch.
"""

from configs import base


def get_config():
  config = base.get_config()
  config.model.weights = "Llama-3.1-8B-Instruct"
  config.model.preset = "llama31_8b"
  config.model.compute_dtype = "bfloat16"
  config.prompt.chat = "llama3"
  config.data.path = "data/train"
  config.data.workers = 8
  # Rows of 8,192 hold four examples of the published length.
  config.regions.context = 6144
  config.regions.response = 1024
  config.regions.examples = 16
  config.train.rows = 32
  config.mesh.tensor = 2
  config.eval.rows = 32
  return config
