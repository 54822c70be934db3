"""The studies of the paper's claims: what each trains or reads, measures and draws."""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from flax import nnx

from alignx_jax import experiment as experiments
from alignx_jax import measuring
from alignx_jax.bridges import inferred_logits, temperature_of
from alignx_jax.config_checks import has_head
from alignx_jax.data.records import Example
from alignx_jax.data.splits import simulated_examples
from alignx_jax.evaluation import controllability as control
from alignx_jax.evaluation.accuracy import BridgeScorer, Scorer
from alignx_jax.evaluation.calibration import softmax
from alignx_jax.evaluation.changes import format_changes
from alignx_jax.evaluation.history_length import by_acts, format_history, history_rows
from alignx_jax.evaluation.pictures import html_table, share_curves
from alignx_jax.experiment import Experiment
from alignx_jax.files import as_path
from alignx_jax.personas.persona import HistoryPolicy
from alignx_jax.personas.simulator import SimulatorConfig


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


def run_study(config, workdir: Path) -> Findings:
  """What config.studies asks for.

  Raises:
    ValueError: there is no such study.
  """
  options = config.studies
  if options.name not in STUDIES:
    raise ValueError(f"config.studies.name is {options.name!r}; set it to {', '.join(STUDIES)}.")
  config = config.copy_and_resolve_references()
  with config.unlocked():
    del config.studies  # so that runs are as those of `alignx_jax.study`
  return STUDIES[options.name](config, options, workdir)


def aligned(
  experiment: Experiment, runs: Path, name: str, fields: Mapping[str, object] | None = None
) -> Policy:
  """A policy of alignx_jax.study, as config.study says: trained, or read where that is done.

  Args:
    fields: of the config that have other values where it is evaluated, nested.
  """
  from alignx_jax.study import RUNS

  objective, bridge = RUNS[name]
  as_trained = experiment.config.study[name]
  trained = experiment.with_objective(objective, bridge=bridge, fields=as_trained)
  params = experiments.run_training(trained, runs / name).params
  evaluated = experiment.with_objective(objective, bridge=bridge, fields=fields)
  return Policy(evaluated, params, runs / name)


# ------------------------------------------------------------------ controllability


def controllability(config, options, workdir: Path) -> Findings:
  """What the three policies make of P̃ and of histories that say something else."""
  experiment = experiments.load_experiment(config)
  runs = as_path(options.runs or workdir)
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


def history_length(config, options, workdir: Path) -> Findings:
  """The three policies by how many acts of a user they see: of one kind, or of both.

  Simulated users have as many as config.studies says, beyond those of training.
  """
  experiment = experiments.load_experiment(config)
  runs = as_path(options.runs or workdir)
  if config.data.path == "simulated":
    users = SimulatorConfig(comments=(options.comments,) * 2, pairs=(options.pairs,) * 2)
    space, size = experiment.formatting.space, config.data.test_records
    test = simulated_examples(size, split="test", space=space, seed=config.seed, users=users)
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
    most = max(found)
    row = found[most]
    points, low, high = (100 * row[key] for key in ("change", "change_low", "change_high"))
    told.append(
      f"{name.split(', ')[0]} {points:+.1f} [{low:+.1f}, {high:+.1f}] points from none to {most}"
    )
  return f"Of the same users, with the number of acts seen: {'; '.join(told)}."


STUDIES = {"controllability": controllability, "history_length": history_length}
