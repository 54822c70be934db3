"""Trains a policy: python -m alignx_jax.train --config=configs/X.py --workdir=DIR.

The same command again resumes. Afterwards it evaluates on the test split and writes
results.json; --noevaluate leaves that out.
"""

from absl import flags

from alignx_jax import command_line

flags.adopt_module_key_flags(command_line)

_EVALUATE = flags.DEFINE_bool("evaluate", True, "Evaluate after training.")


def main(config, workdir):
  # Imported here, so that --help answers at once.
  from alignx_jax import experiment as experiments
  from alignx_jax.bridges import told_by
  from alignx_jax.measuring import measure
  from alignx_jax.training import hosts

  hosts.connect()
  experiment = told_by(experiments.load_experiment(config))
  result = experiments.run_training(experiment, workdir)
  if _EVALUATE.value:
    measure(experiment, result.params, workdir)


if __name__ == "__main__":
  command_line.run(main)
