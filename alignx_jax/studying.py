"""The studies of the paper's claims: what each trains or reads, measures and draws."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from flax import nnx

from alignx_jax import experiment as experiments
from alignx_jax import measuring
from alignx_jax.bridges import inferred_logits, temperature_of
from alignx_jax.data.records import Example
from alignx_jax.evaluation import controllability as control
from alignx_jax.evaluation.accuracy import BridgeScorer, Scorer
from alignx_jax.evaluation.calibration import softmax
from alignx_jax.evaluation.pictures import html_table, share_curves
from alignx_jax.experiment import Experiment
from alignx_jax.files import as_path
from alignx_jax.personas.persona import HistoryPolicy


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
  """A trained policy: what it is evaluated as, its parameters and scores of the test pairs."""

  experiment: Experiment
  params: nnx.State
  workdir: Path
  scorer: "Scorer | BridgeScorer"

  def infer(self, examples: Sequence[Example], history: HistoryPolicy) -> np.ndarray:
    """P̃ [X, P, K] of these users by the policy's bridge, calibrated."""
    logits_XPK = inferred_logits(self.experiment, self.params, examples, history=history)
    return softmax(logits_XPK, temperature_of(self.experiment, self.params, self.workdir))


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


def aligned(experiment: Experiment, runs: Path, name: str) -> Policy:
  """A policy of alignx_jax.study, as config.study says: trained, or read where that is done."""
  from alignx_jax.study import RUNS

  objective, bridge = RUNS[name]
  fields = experiment.config.study[name]
  trained = experiment.with_objective(objective, bridge=bridge, fields=fields)
  params = experiments.run_training(trained, runs / name).params
  evaluated = experiment.with_objective(objective, bridge=bridge)
  scorer = measuring.policy_scorer(evaluated, params, runs / name)
  return Policy(evaluated, params, runs / name, scorer)


# ------------------------------------------------------------------ controllability


def controllability(config, options, workdir: Path) -> Findings:
  """What the three policies make of P̃ and of histories that say something else."""
  experiment = experiments.load_experiment(config)
  runs = as_path(options.runs) if options.runs else workdir
  base = measuring.base_scorer(experiment)
  ica, pba, head = (aligned(experiment, runs, name) for name in ("ica", "pba", "pba_head"))
  results = [
    *control.history_rows("ica", "persona", ica.scorer, base),
    *control.profile_rows("pba", pba.scorer, base),
    *control.history_rows("pba", "inferred", pba.scorer, base),
    *control.bridge_rows("pba_head", head.scorer, base, head.infer),
  ]
  table = control.format_changes(results)
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


STUDIES = {"controllability": controllability}
