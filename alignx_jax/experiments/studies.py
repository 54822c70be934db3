"""The studies of the paper's claims: what each trains or reads, measures and draws."""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path

import numpy as np
from absl import logging
from flax import nnx

from alignx_jax.data.records import Example
from alignx_jax.data.splits import simulated_examples
from alignx_jax.evaluation import controllability as control
from alignx_jax.evaluation.accuracy import CONDITIONS, BridgeScorer, Scorer, accuracy_rows
from alignx_jax.evaluation.calibration import softmax
from alignx_jax.evaluation.changes import format_changes
from alignx_jax.evaluation.history_length import by_acts, format_history, history_rows
from alignx_jax.evaluation.novel_preferences import dimensions_of, divide, savings
from alignx_jax.evaluation.pictures import html_table, share_curves, write_svg
from alignx_jax.evaluation.report import write_report
from alignx_jax.evaluation.results import format_table, write_results
from alignx_jax.experiments import experiment as experiments
from alignx_jax.experiments import measuring
from alignx_jax.experiments.bridges import inferred_logits, temperature_of
from alignx_jax.experiments.config_checks import has_head
from alignx_jax.experiments.experiment import Experiment
from alignx_jax.experiments.study import RUNS
from alignx_jax.files import as_path
from alignx_jax.personas.persona import HistoryPolicy
from alignx_jax.personas.simulator import SimulatorConfig
from alignx_jax.training.loop import train


@dataclasses.dataclass(frozen=True)
class Findings:
  """What a study found.

  Attributes:
    results: rows of results.json.
    table: of them, as Markdown.
    summary: one sentence.
    pictures: (heading, HTML) pairs for the report; the first is an SVG.
  """

  results: Sequence[dict]
  table: str
  summary: str
  pictures: Sequence[tuple[str, str]]


@dataclasses.dataclass(frozen=True)
class Policy:
  """A trained policy: what it is evaluated as, and its parameters."""

  experiment: Experiment
  params: nnx.State
  workdir: Path

  def infer(self, examples: Sequence[Example], history: HistoryPolicy) -> np.ndarray:
    """P̃ [X, P, K] of these users by the policy's bridge, calibrated."""
    logits_XPK = inferred_logits(self.experiment, self.params, examples, history=history)
    return softmax(logits_XPK, temperature_of(self.experiment, self.params, self.workdir))

  def seeing(self, history: HistoryPolicy) -> "Scorer | BridgeScorer":
    """Scores on the test pairs where so much of each user is seen; text is shown so when scored."""
    if has_head(self.experiment.config):
      return measuring.bridge_scorer(self.experiment, self.params, self.workdir, history=history)
    return self.scorer

  @functools.cached_property
  def scorer(self) -> "Scorer | BridgeScorer":
    """Scores on the test pairs."""
    return measuring.policy_scorer(self.experiment, self.params, self.workdir)


def run_study(config, workdir: Path, *, command: str = "") -> Findings:
  """The study that config.study names; writes results.json, report.html and a picture.

  Args:
    command: what reproduces it, for the report.
  Raises:
    ValueError: there is no such study.
  """
  name = config.study.name
  if name not in STUDIES:
    raise ValueError(f"config.study.name is {name!r}; set it to {' or '.join(STUDIES)}.")
  found = STUDIES[name](config, workdir)
  write_results(workdir / "results.json", found.results)
  write_svg(workdir / f"{name}.svg", found.pictures[0][1])
  write_report(
    workdir / "report.html",
    title=name.replace("_", " ").capitalize(),
    summary=found.summary,
    results=found.results,
    curves={},
    config=config,
    command=command,
    versions={name: version(name) for name in ("alignx_jax", "jax", "flax", "optax", "grain")},
    pictures=found.pictures,
  )
  return found


def aligned(
  experiment: Experiment, runs: Path, name: str, fields: Mapping[str, object] | None = None
) -> Policy:
  """A policy of alignx_jax.study, as config.study says: trained, or read where that is done.

  Args:
    fields: of the config that have other values where it is evaluated, nested.
  """
  objective, bridge = RUNS[name]
  as_trained = experiment.config.study[name]
  trained = experiment.with_objective(objective, bridge=bridge, fields=as_trained)
  params = experiments.run_training(trained, runs / name).params
  evaluated = experiment.with_objective(objective, bridge=bridge, fields=fields)
  return Policy(evaluated, params, runs / name)


# ------------------------------------------------------------------ controllability


def controllability(config, workdir: Path) -> Findings:
  """What the three policies make of P̃ and of histories that say something else."""
  experiment = experiments.load_experiment(config)
  runs = as_path(config.study.runs or workdir)
  base = measuring.base_scorer(experiment)
  ica, pba, head = (aligned(experiment, runs, name) for name in ("ica", "pba", "pba_head"))
  results = [
    *control.history_rows("ica", "persona", ica.scorer, base),
    *control.profile_rows("pba", pba.scorer, base),
    *control.history_rows("pba", "inferred", pba.scorer, base),
    *control.bridge_rows("pba_head", head.scorer, base, head.infer),
  ]
  table = format_changes(results)
  lines = {
    name: {
      s: row
      for s in control.STRENGTHS
      for row in results
      if (row["policy"], row["condition"]) == (name, control.strength(s))
      and row["protocol"] == "matched"
    }
    for name in ("pba", "pba_head")
  }
  across = "Strength of one dimension of the pair, from the other pole to the user's"
  flips = {
    r["policy"]: f"{100 * r['flips']:.0f} %"
    for r in results
    if (r["condition"], r["protocol"]) == ("reversed", "matched")
  }
  told = " and ".join(f"{share} of {name}" for name, share in flips.items())
  return Findings(
    results,
    table,
    f"With P̃ reversed in every dimension, these margins change sign: {told or 'none measured'}.",
    [
      ("One dimension steered", share_curves(lines, across=across)),
      ("What each change did", html_table(table)),
    ],
  )


# ------------------------------------------------------------------ history length


def history_length(config, workdir: Path) -> Findings:
  """The three policies by how many acts of a user they see: of one kind, or of both.

  Simulated users have as many as config.study says, beyond those of training.
  """
  experiment = experiments.load_experiment(config)
  options = config.study
  runs = as_path(options.runs or workdir)
  if config.data.path == "simulated":
    users = SimulatorConfig(comments=(options.comments,) * 2, pairs=(options.pairs,) * 2)
    space = experiment.formatting.space
    test = simulated_examples(
      options.users, split="test", space=space, seed=config.seed, users=users
    )
  else:
    test = experiment.test[: options.users]
  experiment = dataclasses.replace(experiment, test=test)
  fields = {"regions": options.regions.to_dict()}
  base = measuring.base_scorer(experiment.with_objective("ica", fields=fields))
  rows = []
  for name in ("ica", "pba", "pba_head"):
    policy = aligned(experiment, runs, name, fields)
    rows += history_rows(name, policy.seeing, base, experiment.test, acts=options.acts)
  table = format_history(rows)
  across = "Acts of the user that the policy sees"
  return Findings(
    rows,
    table,
    _told_by_length(rows),
    [
      ("Comments and pairs", share_curves(by_acts(rows, "acts"), across=across)),
      ("Of one kind", share_curves(by_acts(rows, "comments", "pairs"), across=across)),
      ("By the number of acts", html_table(table)),
    ],
  )


def _told_by_length(rows) -> str:
  told = []
  for name, found in by_acts(rows, "acts").items():
    if not found:
      continue  # none of its pairs could be scored, which was told
    most = max(found)
    row = found[most]
    points, low, high = (100 * row[key] for key in ("change", "change_low", "change_high"))
    told.append(
      f"{name.split(', ')[0]} {points:+.1f} [{low:+.1f}, {high:+.1f}] points from none to {most}"
    )
  return f"Of the same users, with the number of acts seen: {'; '.join(told)}."


# ------------------------------------------------------------------ novel preferences


def novel_preferences(config, workdir: Path) -> Findings:
  """A policy aligned without some dimensions, and the base, each trained on a few examples of them.

  Accuracy is of test users whose pairs are of the held-out dimensions alone, under the base as the
  reference: `matched` told the same, `unconditioned` told nothing.
  """
  study, experiment = config.study, experiments.load_experiment(config)
  objective, bridge = _reads_text(study.policy)
  known, novel, test = _held_out(experiment, study)
  counts = [n for n in sorted(set(study.examples)) if 0 < n <= len(novel)]
  if too_many := [n for n in study.examples if n > len(novel)]:
    logging.warning("There are %d examples of what is held out, not %s.", len(novel), too_many)

  def trained(examples, fields, name, start=None):
    one = dataclasses.replace(experiment, train=examples, validation=[], test=test)
    one = one.with_objective(objective, bridge=bridge, fields=config.study[study.policy])
    one = one.with_objective(objective, bridge=bridge, fields=fields)
    loader, options = experiments.training_loader(one), {"model": one.model, "mesh": one.mesh}
    result = train(
      one.config, workdir / name, load=start or one.load_base, loader=loader, **options
    )
    return dataclasses.replace(one, workdir=workdir / name), result.params

  evaluated = dataclasses.replace(experiment, test=test).with_objective(objective, bridge=bridge)
  base = measuring.base_scorer(evaluated)
  condition = CONDITIONS[study.policy][0]

  def rows(params, start, n, protocols=("matched", "unconditioned")):
    policy = measuring.text_scorer(evaluated, study.policy, params)
    told = {"matched": condition, "unconditioned": "none"}
    return [
      row | {"start": start, "trained_on": n}
      for protocol in protocols
      for row in accuracy_rows(
        study.policy,
        f"{start} + {n}",
        protocol,
        test,
        policy.score(condition) - base.score(told[protocol]),
      )
    ]

  aligned_run, params = trained(known, {}, "aligned")
  results = rows(params, "aligned", 0)
  # The base has no margin against itself.
  results += rows(evaluated.load_base(), "base", 0, ("unconditioned",))
  starts = {"aligned": lambda: experiments.restored_params(aligned_run), "base": None}
  for name, start in starts.items():
    for n in counts:
      run = f"{name}_{n}"
      results += rows(trained(novel[:n], study.tuning[name], run, start)[1], name, n)
  lines = {
    protocol: {
      name: {r["trained_on"]: r for r in results if (r["start"], r["protocol"]) == (name, protocol)}
      for name in starts
    }
    for protocol in ("matched", "unconditioned")
  }
  saved = {
    protocol: savings(*({n: r["accuracy"] for n, r in line.items()} for line in both.values()))
    for protocol, both in lines.items()
  }
  for row in results:
    if row["start"] == "aligned":
      row |= saved[row["protocol"]].get(row["trained_on"], {})
  across = "Examples of the held-out dimensions, after alignment without them, or none"
  table = format_table(results)
  return Findings(
    results,
    table,
    _told_savings(saved["matched"]),
    [
      ("Matched", share_curves(lines["matched"], across=across)),
      ("Unconditioned", share_curves(lines["unconditioned"], across=across)),
    ],
  )


def _reads_text(policy: str) -> tuple[str, str]:
  if policy not in ("ica", "pba"):
    raise ValueError(f"config.study.policy is {policy!r}; set it to 'ica' or 'pba'.")
  return RUNS[policy]


def _held_out(experiment: Experiment, study) -> tuple[list[Example], ...]:
  """Examples without the held-out dimensions, and of these alone for training and test."""
  config, space = experiment.config, experiment.formatting.space
  held_out = dimensions_of(space, study.held_out)
  if config.data.path != "simulated":
    (known, novel), (_, test) = (divide(e, held_out) for e in (experiment.train, experiment.test))
    for what, examples in (("known", known), ("held-out", novel), ("held-out test", test)):
      if not examples:
        raise ValueError(
          f"{config.data.path} has no {what} examples; hold out others (config.study.held_out)."
        )
    return known, novel, test[: study.users]
  kept = sorted(set(range(len(space))) - set(held_out))
  # Nobody of the validation split trains otherwise.
  return tuple(
    simulated_examples(
      size,
      split=split,
      space=space,
      seed=config.seed,
      users=SimulatorConfig(among=tuple(among)),
    )
    for size, split, among in (
      (config.data.train_records, "train", kept),
      (max(study.examples), "validation", held_out),
      (study.users, "test", held_out),
    )
  )


def _told_savings(saved: Mapping[int, dict]) -> str:
  told = [
    f"after {n} examples {100 * s['accuracy']:.1f} %, for which the base needs "
    f"{'more than ' if s['at_least'] else ''}{s['base_needs']:.0f} "
    f"({'>' if s['at_least'] else ''}{s['ratio']:.1f} times as many)"
    for n, s in saved.items()
  ]
  return f"Of dimensions that alignment never met: {'; '.join(told) or 'nothing measured'}."


STUDIES = {
  "controllability": controllability,
  "history_length": history_length,
  "novel_preferences": novel_preferences,
}
