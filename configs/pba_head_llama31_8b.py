"""Llama-3.1-8B-Instruct aligned through a learned bridge (PBA) on AlignX, on 64 chips.

As ica_llama31_8b.py. The examples of a row stand in two places: their personas, which the
bridge reads, and behind P̃ as tokens, their prompts and responses, which the policy reads.
"""

from configs import ica_llama31_8b


def get_config():
  config = ica_llama31_8b.get_config()
  config.objective.name = "pba"
  config.bridge.kind = "head"
  # Four examples of the published length, as in ICA's rows: 1,536 tokens of persona in some 14
  # parts, 204 of prompt, 256 of each response. Of 90 bridge tokens each there is room for eight,
  # so that short examples fill a row too: 720 + 816 + 2 · 1,024 positions beside the 6,144.
  config.regions.persona = 6144
  config.regions.parts = 80
  config.regions.examples = 8
  config.regions.prompt = 816
  return config
