"""SmolLM2-135M-Instruct aligned through the text bridge (PBA) on P-Soups.

As smollm2_p_soups_ica.py, but the policy sees P̃, the record's precomputed profile,
instead of the compared pairs.
"""

from configs import smollm2_p_soups_ica


def get_config():
  config = smollm2_p_soups_ica.get_config()
  config.objective.name = "pba"
  config.train.steps = 0  # the whole epoch: its prompts are short
  return config
