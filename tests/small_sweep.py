"""A sweep of small runs, for tests: python -m alignx_jax.sweep --sweep=tests/small_sweep.py."""

import json
import os

from alignx_jax.sweeps.options import sweep_options
from alignx_jax.sweeps.space import Trial
from tests.small_records import small_config


def get_config():
  config = small_config(os.environ.get("SMALL_RECORDS", ""))
  with config.unlocked():
    config.sweep = sweep_options()
  return config


def get_sweep():
  """Trials from JSON, name -> overrides, in SMALL_TRIALS."""
  for name, overrides in json.loads(os.environ["SMALL_TRIALS"]).items():
    yield Trial(name, overrides)
