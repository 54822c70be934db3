"""Evaluates a trained workdir: python -m alignx_jax.evaluate --config=… --workdir=DIR."""

from pathlib import Path

from absl import app, flags
from ml_collections import config_flags

_CONFIG = config_flags.DEFINE_config_file("config", None, "Configuration.", lock_config=True)
_WORKDIR = flags.DEFINE_string("workdir", None, "A workdir that alignx_jax.train has filled.")
flags.mark_flags_as_required(["config", "workdir"])


def main(argv):
  del argv
  from alignx_jax import experiment as experiments
  from alignx_jax.evaluation.report import format_table, write_results

  workdir = Path(_WORKDIR.value)
  experiment = experiments.load_experiment(_CONFIG.value)
  params = experiments.trained_params(experiment, workdir)
  results = experiments.evaluate_alone(experiment, params)
  write_results(workdir / "results.json", results)
  print(format_table(results))


if __name__ == "__main__":
  app.run(main)
