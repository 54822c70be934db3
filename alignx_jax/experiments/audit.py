"""A trained run's bias audit: by group, by counterfactual, and of what its P̃ gives away."""

import dataclasses
import json
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

import numpy as np
from flax import nnx

from alignx_jax.data.groups import NOT_KNOWN
from alignx_jax.data.records import Example
from alignx_jax.evaluation.accuracy import CONDITIONS, Scorer, accuracy_rows
from alignx_jax.evaluation.bias import LEAST_PAIRS, audit_groups, groups_of
from alignx_jax.evaluation.bias_report import LEGEND, format_audit, pictures, remarks
from alignx_jax.evaluation.calibration import softmax
from alignx_jax.evaluation.counterfactual import Seen, counterfactual_rows, counterfactuals
from alignx_jax.evaluation.leakage import leakage_row, users_of
from alignx_jax.evaluation.report import write_report
from alignx_jax.experiments import experiment as experiments
from alignx_jax.experiments import measuring
from alignx_jax.experiments.bridges import directions_of, inferred_logits, teller, temperature_of
from alignx_jax.experiments.config_checks import has_head
from alignx_jax.experiments.experiment import Experiment
from alignx_jax.files import write_text
from alignx_jax.personas.demographics import GROUPS, NOT_STATED
from alignx_jax.personas.distribution import DIRECTIONS_K
from alignx_jax.personas.persona import HistoryPolicy
from alignx_jax.training import hosts
from alignx_jax.training.metrics import read_metrics
from alignx_jax.training.run_config import run_config

_WITHHELD = HistoryPolicy(kinds=("ugc", "pair"))  # a persona without its description


@dataclasses.dataclass(frozen=True)
class Audited:
  """A trained policy and its reference, to be shown examples.

  Attributes:
    experiment: of the run, on the examples of the audit, with its workdir.
    base: scores of the reference.
  """

  experiment: Experiment
  params: nnx.State
  base: Scorer

  @property
  def name(self) -> str:
    """What the policy is called in results."""
    return measuring.policy_name(self.experiment.config)

  def look(self, examples: Sequence[Example]) -> tuple[Seen, np.ndarray]:
    """What the policy makes of examples, and their log-ratios [X, N] (protocol `matched`)."""
    experiment = dataclasses.replace(self.experiment, test=examples)
    config, condition = experiment.config, CONDITIONS[self.name][0]
    inferred_XPK = None
    if has_head(config):
      policy = measuring.bridge_scorer(experiment, self.params, experiment.workdir)
      inferred_XPK, reference = policy.inferred_XPK, "none"
    else:
      if config.bridge.inferred_by and config.objective.name == "pba":
        experiment = dataclasses.replace(experiment, test=teller(experiment)(examples))
      policy = measuring.text_scorer(experiment, self.name, self.params)
      reference = condition
    base = dataclasses.replace(self.base, examples=experiment.test)
    ratio_XN = policy.score(condition) - base.score(reference)
    margin_X = config.objective.beta * (ratio_XN[:, 0] - ratio_XN[:, 1]).astype(np.float64)
    return Seen(margin_X, inferred_XPK), ratio_XN

  def withheld(self) -> np.ndarray:
    """P̃ [X, P, K] that the bridge infers where it does not see the description."""
    temperature = temperature_of(self.experiment, self.params, self.experiment.workdir)
    logits_XPK = inferred_logits(
      self.experiment, self.params, self.experiment.test, history=_WITHHELD
    )
    return softmax(logits_XPK, temperature)


def load_audited(config, workdir: Path) -> Audited:
  """A run's newest checkpoint, to be audited on the test examples of a config.

  What it is, is as its config.json says: model, prompts, objective, seed. On what it is audited
  and how, is as `config` says: `data`, `regions`, `eval`, `mesh`.

  Raises:
    FileNotFoundError, ValueError: what is not there or does not fit, and the field to set.
  """
  run = run_config(base=config, workdir=workdir)
  run.data, run.regions = config.data, config.regions
  experiment = experiments.load_experiment(run)
  experiment = dataclasses.replace(experiment, workdir=workdir)
  if has_head(run):
    experiments.check_space(experiment, workdir)
  base = measuring.base_scorer(experiment)
  return Audited(experiment, experiments.restored_params(experiment), base)


def audit(config, workdir: Path, *, dimensions: Sequence[str] = ()) -> dict:
  """Audits a run; see `load_audited`.

  Args:
    dimensions: poles whose holders are compared though they be few; of the others those are
      that have enough.
  Returns:
    What bias.json holds: the rows of `groups` and `gaps` (evaluation/bias.py), `counterfactual`
    and `leakage`, and what they are of.
  Raises:
    ValueError: there is no such pole, or no pair could be scored.
  """
  audited = load_audited(config, workdir)
  experiment = audited.experiment
  examples, space = list(experiment.test), experiment.formatting.space
  chosen = {pole: groups_of(examples, pole, space) for pole in dimensions}
  seen, ratio_XN = audited.look(examples)
  overall = accuracy_rows(audited.name, CONDITIONS[audited.name][0], "matched", examples, ratio_XN)
  if not overall:
    raise ValueError(f"None of the {len(examples)} test pairs could be scored; the log says why.")

  named = {space.find(pole)[0] for pole in dimensions}
  others = [d.positive for i, d in enumerate(space.dimensions) if i not in named]
  held = {pole: groups_of(examples, pole, space) for pole in others}
  enough = lambda of: min(of.count("positive"), of.count("negative")) >= LEAST_PAIRS
  large = {pole: of for pole, of in held.items() if enough(of)}
  posts = [example.post for example in examples]
  stated = {attribute: groups_of(examples, attribute, space) for attribute in GROUPS}
  probabilities = experiment.config.objective.loss == "sigmoid"
  groups, gaps = [], []
  for attribute, of in {**stated, **chosen, **large}.items():
    rows = audit_groups(attribute, of, seen.margin_X, posts, probabilities=probabilities)
    groups += rows[0]
    gaps += rows[1]

  swaps, note, after = counterfactuals(examples), "", []
  if audited.name in ("pba", "dpo"):
    note = f"The prompts of {audited.name} have nothing of a user's description: none is swapped."
  elif swaps:
    others_seen, _ = audited.look([swap.example for swap in swaps])
    after = counterfactual_rows(swaps, seen, others_seen, experiment.space)

  return {
    **overall[0],
    "workdir": str(workdir),
    "data": experiment.config.data.path,
    "groups": groups,
    "gaps": gaps,
    "smallest": _smallest(groups),
    "dimensions": len(space),
    "dimensions_too_small": len(held) - len(large),
    "counterfactual": after,
    "leakage": _leakage(audited, stated),
    "note": note,
  }


def write_audit(found: dict, config, workdir: Path, *, command: str) -> str:
  """Writes bias.json and bias.html to a run's workdir; returns the tables as text."""
  write_text(workdir / "bias.json", json.dumps(found, indent=1, allow_nan=False) + "\n")
  write_report(
    workdir / "bias.html",
    title=f"Bias audit of {workdir}",
    summary=" ".join(remarks(found)[: len(found["smallest"])]),
    results=[{k: v for k, v in found.items() if not isinstance(v, list | dict)}],
    curves={found["policy"]: read_metrics(workdir)},
    config=config,
    command=command,
    versions={name: version(name) for name in ("alignx_jax", "jax", "numpy", "scipy")},
    sections=[("What to know", remarks(found)), ("What the tables say", LEGEND)],
    pictures=pictures(found),
  )
  return format_audit(found)


def run_audit(config, workdir: Path, *, dimensions: Sequence[str] = (), command: str = "") -> str:
  """Audits a run, writes bias.json and bias.html; the tables as text, of the first process."""
  found = audit(config, workdir, dimensions=dimensions)
  return write_audit(found, config, workdir, command=command) if hosts.is_first() else ""


def _smallest(groups) -> dict[str, dict]:
  """The smallest stated or known group of each attribute."""
  found = {}
  for attribute in dict.fromkeys(row["attribute"] for row in groups):
    rows = [
      row
      for row in groups
      if row["attribute"] == attribute and row["group"] not in (NOT_STATED, NOT_KNOWN)
    ]
    if rows:
      row = min(rows, key=lambda row: row["examples"])
      found[attribute] = {"group": row["group"], "examples": row["examples"]}
  return found


def _leakage(audited: Audited, stated: dict[str, list[str]]) -> list[dict]:
  """Rows of each attribute and P̃: all of it, and without the dimensions of demographics."""
  experiment = audited.experiment
  users = users_of(experiment.test)
  predictors = {}
  if has_head(experiment.config):
    predictors["head"] = audited.withheld()
  labels_XP = directions_of(experiment, experiment.test)
  golden_XPK = (np.nan_to_num(labels_XP, nan=0.5)[..., None] == DIRECTIONS_K).astype(np.float64)
  golden_XPK[~np.isfinite(labels_XP).any(axis=1)] = np.nan
  predictors["golden"] = golden_XPK
  demographic = experiment.space.groups.get("demographics", [])
  rest = [p for p in range(len(experiment.space)) if p not in demographic]
  if demographic:
    for name, values_XPK in list(predictors.items()):
      predictors[f"{name}, less demographics"] = values_XPK[:, rest]
  return [
    {"attribute": attribute, "predictor": name} | leakage_row(values_XPK, stated[attribute], users)
    for attribute in GROUPS
    for name, values_XPK in predictors.items()
  ]
