"""Makes the small base model that the simulated study starts from.

  python -m alignx_jax.pretrain_base --config=configs/base_model_simulated.py --workdir=runs/base

The same command again resumes. Afterwards it measures the base and prints the table that
stands in alignx_jax/models/simulated_base/README.md.
"""

from absl import flags

from alignx_jax import command_line

flags.adopt_module_key_flags(command_line)


def main(config, workdir):
  from alignx_jax.evaluation.results import format_table
  from alignx_jax.experiments import experiment as experiments
  from alignx_jax.experiments.config_checks import OBJECTIVES
  from alignx_jax.experiments.measuring import base_results, base_scorer
  from alignx_jax.training.pretraining import pretrain

  directory = pretrain(config, workdir)
  config.study.model.weights = str(directory)
  experiment = experiments.load_experiment(config.study)
  base = base_scorer(experiment)
  print(format_table(base_results(experiment, base, OBJECTIVES)))


if __name__ == "__main__":
  command_line.run(main)
