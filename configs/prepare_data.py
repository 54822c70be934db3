"""Published files to a prepared data set.

  python -m alignx_jax.prepare_data --config=configs/prepare_data.py \\
    --config.name=p_soups --config.files="('friendly_unfriendly.json',)" --workdir=data/p_soups

In as many processes as there are cores. The same command again goes on where it stopped.
"""

from ml_collections import ConfigDict

from configs import base


def get_config():
  config = ConfigDict()
  config.name = "train"  # a set of alignx_jax/data/alignx.py
  config.files = ("",)  # paths, URLs (gs://, hf://, …) and patterns, parquet or JSON lists
  # Of `simulated`, which needs no files: users of each split.
  config.simulated = ConfigDict({"train": 10_000, "validation": 500, "test": 500})
  config.seed = 0  # of samples, validation users and simulated users
  config.validation_share = 0.005  # of users; benchmarks have none
  config.shard_records = 8192  # about so many source rows make a shard
  config.max_characters = 200_000  # of one text; a longer one is refused
  config.max_history = 16  # items; more are refused
  config.max_bad_share = 0.01  # of rows; above it the exit code is 2
  config.engine = "processes"  # or "beam": Apache Beam
  config.workers = 0  # processes; 0: as many as cores
  config.beam_options = ()  # like "--runner=DataflowRunner"; none: runs here
  # Region sizes are proposed for this tokenizer (as config.model.tokenizer) and formatting.
  config.tokenizer = ""  # empty: none are
  config.layouts = (2048, 4096, 8192)  # tokens of a row
  config.measured = 2000  # records, evenly spread
  config.prompt = base.get_config().prompt
  config.history = base.get_config().history
  config.lock()
  return config
