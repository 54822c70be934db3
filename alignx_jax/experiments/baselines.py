"""What personal alignment has to beat, in the harness of the study and in one table."""

from pathlib import Path

from alignx_jax.evaluation.accuracy import few_shot, length_control
from alignx_jax.evaluation.results import write_results
from alignx_jax.experiments import experiment as experiments
from alignx_jax.experiments import measuring

POLICIES = ("dpo", "pba", "vpl")  # objectives that are trained


def run_baselines(config, workdir: Path) -> tuple[list[dict], list[dict]]:
  """Trains and evaluates every baseline on the config's data.

  Args:
    config: has in `baselines`, by objective, the fields that its training alone has.
  Returns:
    The rows of results.json and those of latent.json, which are written to `workdir`.
  """
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
