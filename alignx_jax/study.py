"""The main job: one base aligned by ICA and by PBA, evaluated beside it, in one report.

  python -m alignx_jax.study --config=configs/study_simulated.py --workdir=runs/study

The same command again resumes. Prints one table; writes results.json and report.html.
"""

import sys
from importlib.metadata import version
from pathlib import Path

from absl import flags

from alignx_jax import command_line

flags.adopt_module_key_flags(command_line)


def run_study(config, workdir: Path, *, command: str = "") -> list[dict]:
  """Trains and evaluates every objective on the config's data.

  Args:
    command: what reproduces it, for the report.
  Returns:
    The rows of results.json, which is written with report.html and accuracy.svg to `workdir`.
  """
  # Imported here, so that --help answers at once.
  from alignx_jax import experiment as experiments
  from alignx_jax.evaluation.pictures import write_picture
  from alignx_jax.evaluation.report import write_report
  from alignx_jax.evaluation.results import write_results
  from alignx_jax.training.metrics import read_metrics

  experiment = experiments.load_experiment(config)
  base = experiments.base_scorer(experiment)
  results = experiments.base_results(experiment, base, experiments.OBJECTIVES)
  curves = {}
  for name in experiments.OBJECTIVES:
    aligned = experiment.with_objective(name)
    params = experiments.run_training(aligned, workdir / name).params
    results += experiments.policy_results(aligned, params, base)
    curves[name] = read_metrics(workdir / name)

  write_results(workdir / "results.json", results)
  write_picture(workdir / "accuracy.svg", results)
  write_report(
    workdir / "report.html",
    title="Aligning to each user: ICA and PBA",
    summary=_summary(results),
    results=results,
    curves=curves,
    config=config,
    command=command,
    versions={name: version(name) for name in ("alignx_jax", "jax", "flax", "optax", "grain")},
    sections=[_one_user(experiment)] if config.data.path == "simulated" else [],
  )
  return results


def _summary(results: list[dict]) -> str:
  def percent(policy, condition, protocol):
    rows = [r for r in results if (r["policy"], r["condition"]) == (policy, condition)]
    found = [r for r in rows if r["protocol"] == protocol]
    return f"{100 * found[0]['accuracy']:.1f} %" if found else "not measured"

  return (
    f"On users never seen in training, the policy that reads the persona (ICA) prefers the "
    f"user's choice in {percent('ica', 'persona', 'matched')} of pairs and the one that reads "
    f"inferred preferences (PBA) in {percent('pba', 'inferred', 'matched')}; the untrained base "
    f"reaches {percent('base', 'persona', 'unconditioned')} from the persona."
  )


def _one_user(experiment) -> tuple[str, list[str]]:
  from alignx_jax.data.formatting import infer_profile

  example = experiment.test[0]
  lines = [f"Asked “{c.post}” they wrote: {c.comment}" for c in example.persona.comments]
  lines += [
    f"Asked “{p.post}” they preferred “{p.chosen}” to “{p.rejected}”" for p in example.persona.pairs
  ]
  profile = infer_profile(example, example.persona, experiment.formatting.space)
  return "One simulated test user", [
    *lines,
    f"Inferred P̃: {profile}",
    f"Test post: “{example.post}” Chosen: {example.chosen} Rejected: {example.rejected}",
  ]


def main(config, workdir):
  from alignx_jax.evaluation.results import format_table

  command = " ".join(["python -m alignx_jax.study", *sys.argv[1:]])
  print(format_table(run_study(config, workdir, command=command)))
  print(f"\nReport: {workdir / 'report.html'}")


if __name__ == "__main__":
  command_line.run(main)
