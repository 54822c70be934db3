"""Evaluates a trained workdir: python -m alignx_jax.evaluate --config=… --workdir=DIR."""

from absl import flags

from alignx_jax import command_line

flags.adopt_module_key_flags(command_line)


def main(config, workdir):
  # Imported here, so that --help answers at once.
  from alignx_jax import experiment as experiments
  from alignx_jax.bridges import told_by
  from alignx_jax.measuring import measure
  from alignx_jax.training import hosts

  hosts.connect()
  experiment = told_by(experiments.load_experiment(config))
  params = experiments.trained_params(experiment, workdir)
  measure(experiment, params, workdir)


if __name__ == "__main__":
  command_line.run(main)
