"""The main job: one base aligned by ICA and by PBA with both bridges, in one report."""

import dataclasses
from importlib.metadata import version
from pathlib import Path

import numpy as np

from alignx_jax.data.formatting import infer_profile
from alignx_jax.evaluation import preference_pictures
from alignx_jax.evaluation.calibration import reliability
from alignx_jax.evaluation.pictures import write_picture, write_svg
from alignx_jax.evaluation.report import write_report
from alignx_jax.evaluation.results import write_results
from alignx_jax.experiments import bridges, measuring
from alignx_jax.experiments import experiment as experiments
from alignx_jax.personas.persona import HistoryPolicy
from alignx_jax.training.metrics import read_metrics

RUNS = {"ica": ("ica", "text"), "pba": ("pba", "text"), "pba_head": ("pba", "head")}
ACTS = (0, 1, 2)  # of a user, in the comparison where little is known


def run_study(config, workdir: Path, *, command: str = "") -> list[dict]:
  """Trains and evaluates ICA, and PBA with both bridges, on the config's data.

  Args:
    command: what reproduces it, for the report.
  Returns:
    The rows of results.json, which is written with preferences.json, report.html and pictures to
    `workdir`.
  """
  experiment = experiments.load_experiment(config)
  base = measuring.base_scorer(experiment)
  results = measuring.base_results(experiment, base, ("ica", "pba"))
  curves, policies = {}, {}
  for name, (objective, bridge) in RUNS.items():
    trained = experiment.with_objective(objective, bridge=bridge, fields=config.study[name])
    params = experiments.run_training(trained, workdir / name).params
    aligned = experiment.with_objective(objective, bridge=bridge)
    policies[name] = measuring.policy_scorer(aligned, params, workdir / name)
    results += measuring.policy_results(aligned, policies[name], base)
    curves[name] = read_metrics(workdir / name)

  # P̃ of the learned bridge, told as text to the policy that reads text.
  inferred_XPK = policies["pba_head"].inferred_XPK
  threshold = config.bridge.threshold
  told = bridges.profiled(experiment.test, inferred_XPK, aligned.space, threshold=threshold)
  results += measuring.told_results("pba", policies["pba"], base, told)

  results += _few_acts(aligned, params, workdir / "pba_head", policies["ica"], base)

  write_results(workdir / "results.json", results)
  write_picture(workdir / "accuracy.svg", results)
  preferences = bridges.preference_rows(aligned, inferred_XPK)
  pictures = []
  if preferences:
    write_results(workdir / "preferences.json", preferences)
    labels_XP = bridges.directions_of(aligned, experiment.test)
    labels_XP[~np.isfinite(inferred_XPK).all(axis=(1, 2))] = np.nan
    groups = {
      group: reliability(inferred_XPK, labels_XP, dimensions=dimensions)
      for group, dimensions in aligned.space.groups.items()
    }
    one = {"space": aligned.space, "probabilities_PK": inferred_XPK[0], "truth_P": labels_XP[0]}
    chart = preference_pictures.preference_chart(**one)
    if "<svg" in chart:  # P̃ says something
      write_svg(workdir / "preferences.svg", chart)
    pictures = [
      ("One simulated test user, as P̃", chart),
      ("How well P̃ is inferred", preference_pictures.preference_table(preferences)),
      ("Is it as often so as P̃ says", preference_pictures.reliability_diagram(groups)),
    ]
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
    pictures=pictures,
  )
  return results


def _few_acts(head, params, workdir, ica, base) -> list[dict]:
  """What ICA and the learned bridge come to where little is known of each user."""
  few = head.test[: head.config.study.few_acts_pairs]
  ica, base = (dataclasses.replace(scorer, examples=few) for scorer in (ica, base))
  results = []
  for acts in ACTS:
    known = HistoryPolicy("fixed", acts)
    bridge = measuring.bridge_scorer(
      dataclasses.replace(head, test=few), params, workdir, history=known
    )
    results += measuring.few_acts_results("ica", ica, base, acts)
    results += measuring.few_acts_results("pba_head", bridge, base, acts)
  return results


def _summary(results: list[dict]) -> str:
  def percent(policy, condition, protocol):
    rows = [r for r in results if (r["policy"], r["condition"]) == (policy, condition)]
    found = [r for r in rows if r["protocol"] == protocol]
    return f"{100 * found[0]['accuracy']:.1f} %" if found else "not measured"

  return (
    f"On users never seen in training, the policy that reads the persona (ICA) prefers the "
    f"user's choice in {percent('ica', 'persona', 'matched')} of pairs, the one that reads "
    f"preferences averaged from labels (PBA) in {percent('pba', 'inferred', 'matched')}, and the "
    f"one that infers them without labels in {percent('pba_head', 'inferred', 'matched')}; the "
    f"untrained base reaches {percent('base', 'persona', 'unconditioned')} from the persona."
  )


def _one_user(experiment) -> tuple[str, list[str]]:
  example = experiment.test[0]
  lines = [f"Asked “{c.post}” they wrote: {c.comment}" for c in example.persona.comments]
  lines += [
    f"Asked “{p.post}” they preferred “{p.chosen}” to “{p.rejected}”" for p in example.persona.pairs
  ]
  profile = infer_profile(example, example.persona, experiment.formatting.space)
  return "One simulated test user", [
    *lines,
    f"P̃ by the labels of the history: {profile}",
    f"Test post: “{example.post}” Chosen: {example.chosen} Rejected: {example.rejected}",
  ]
