"""Llama-3.1-8B-Instruct aligned through the text bridge (PBA) on AlignX, on 64 chips.

As ica_llama31_8b.py. A prompt holds P̃ instead of the persona, so twice as many examples
share a row, of which half is for responses, and half as many rows make a step.
"""

from configs import ica_llama31_8b


def get_config():
  config = ica_llama31_8b.get_config()
  config.objective.name = "pba"
  config.regions.context = 4096
  config.regions.response = 2048
  config.train.rows = 16
  config.mesh.tensor = 4
  config.eval.rows = 16
  return config
