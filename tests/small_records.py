"""Records of a few words each, and runs on them, for tests in which rows must be short."""

import json
from pathlib import Path

import numpy as np

from configs import base


def small_record(i: int) -> dict:
  """Record i in the published schema; twelve posts, over which 48 records are spread."""
  rng = np.random.default_rng(i)
  words = lambda n: " ".join(rng.choice(["sun", "rain", "tea", "fog", "oak"], n))
  directions = [0.5] * 90
  directions[i % 90] = int(rng.integers(2))
  item = {"prompt": words(1), "comment": words(2), "Preference Direction": directions}
  return {
    "prompt": f"post {i % 12}",
    "chosen": words(2),
    "rejected": words(3),
    "Preference Direction": directions,
    "User-Generated Content": [item, item],
  }


def write_small_records(path: Path, count: int = 48) -> Path:
  """Writes a JSON list of them."""
  path.write_text(json.dumps([small_record(i) for i in range(count)]), encoding="utf-8")
  return path


def small_config(path: Path):
  """A config of a run of six steps on 48 of them."""
  config = base.get_config()
  config.model.weights = "preset:tiny"
  config.data.path = str(path)
  config.regions.update(context=512, response=32, examples=3)
  config.optimizer.learning_rate = 1e-2
  config.train.update(rows=2, checkpoint_every=2, devices=1)
  config.eval.rows = 2
  return config
