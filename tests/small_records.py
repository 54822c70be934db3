"""Records of a few words each, for tests in which rows must be short."""

import numpy as np


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
