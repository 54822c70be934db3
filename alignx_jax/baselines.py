"""What personal alignment has to beat, in the harness of the study and in one table.

  python -m alignx_jax.baselines --config=configs/baselines_simulated.py --workdir=runs/baselines

Trains universal DPO, label averaging and variational preference learning, and prompts the base
with personas. The same command again resumes. Writes results.json and latent.json.
"""

from pathlib import Path

from absl import flags

from alignx_jax import command_line

flags.adopt_module_key_flags(command_line)

POLICIES = ("dpo", "pba", "vpl")  # objectives that are trained


def run_baselines(config, workdir: Path) -> tuple[list[dict], list[dict]]:
  """Trains and evaluates every baseline on the config's data.

  Args:
    config: has in `baselines`, by objective, the fields that its training alone has.
  Returns:
    The rows of results.json and those of latent.json, which are written to `workdir`.
  """
  # Imported here, so that --help answers at once.
  from alignx_jax import experiment as experiments
  from alignx_jax import measuring
  from alignx_jax.evaluation.accuracy import few_shot, length_control
  from alignx_jax.evaluation.results import write_results

  experiment = experiments.load_experiment(config)
  base = measuring.base_scorer(experiment)
  results = [length_control(experiment.test), *few_shot(base)]
  for name in POLICIES:
    trained = experiment.with_objective(name, fields=config.baselines[name])
    params = experiments.run_training(trained, workdir / name).params
    aligned = experiment.with_objective(name)
    policy = measuring.policy_scorer(aligned, params, workdir / name)
    results += measuring.policy_results(aligned, policy, base)
  latents = measuring.latents_of(aligned, params)
  write_results(workdir / "results.json", results)
  write_results(workdir / "latent.json", latents)
  return results, latents


def main(config, workdir):
  from alignx_jax.evaluation.latents import summarise
  from alignx_jax.evaluation.results import format_policies, format_table

  results, latents = run_baselines(config, workdir)
  print(f"{format_table(results)}\n\n{format_policies(results)}\n\n{summarise(latents)}")


if __name__ == "__main__":
  command_line.run(main)
