"""Trains a policy: python -m alignx_jax.train --config=configs/X.py --workdir=DIR.

The same command again resumes. Afterwards it evaluates on the test split and writes
results.json; --noevaluate leaves that out.
"""

from pathlib import Path

from absl import app, flags
from ml_collections import config_flags

_CONFIG = config_flags.DEFINE_config_file("config", None, "Configuration.", lock_config=True)
_WORKDIR = flags.DEFINE_string("workdir", None, "Where checkpoints and results are written.")
_EVALUATE = flags.DEFINE_bool("evaluate", True, "Evaluate after training.")
flags.mark_flags_as_required(["config", "workdir"])


def main(argv):
  del argv
  # Imported here, so that --help answers at once.
  from alignx_jax import experiment as experiments
  from alignx_jax.evaluation.report import format_table, write_results

  workdir = Path(_WORKDIR.value)
  experiment = experiments.load_experiment(_CONFIG.value)
  result = experiments.run_training(experiment, workdir)
  if _EVALUATE.value:
    results = experiments.evaluate_alone(experiment, result.params)
    write_results(workdir / "results.json", results)
    print(format_table(results))


if __name__ == "__main__":
  app.run(main)
