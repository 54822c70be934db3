"""What personal alignment has to beat, in the harness of the study and in one table.

  python -m alignx_jax.baselines --config=configs/baselines_simulated.py --workdir=runs/baselines

Trains universal DPO, label averaging and variational preference learning, and prompts the base
with personas. The same command again resumes. Writes results.json and latent.json.
"""

from absl import flags

from alignx_jax import command_line

flags.adopt_module_key_flags(command_line)


def main(config, workdir):
  # Imported here, so that --help answers at once.
  from alignx_jax.evaluation.latents import summarise
  from alignx_jax.evaluation.results import format_policies, format_table
  from alignx_jax.experiments.baselines import run_baselines

  results, latents = run_baselines(config, workdir)
  print(f"{format_table(results)}\n\n{format_policies(results)}\n\n{summarise(latents)}")


if __name__ == "__main__":
  command_line.run(main)
