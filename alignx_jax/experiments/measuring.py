"""What an experiment's policies are worth: rows of results.json, and of preferences.json."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np
from flax import nnx

from alignx_jax.data.loader import Loader
from alignx_jax.evaluation.accuracy import (
  CONDITIONS,
  BridgeScorer,
  LatentScorer,
  Scorer,
  accuracy_rows,
  evaluate_base,
  evaluate_policy,
  length_control,
)
from alignx_jax.evaluation.calibration import format_preference_table, softmax
from alignx_jax.evaluation.history_length import matched_ratio
from alignx_jax.evaluation.latents import latent_results, summarise
from alignx_jax.evaluation.results import format_table, write_results
from alignx_jax.experiments.bridges import inferred_logits, preference_rows, temperature_of
from alignx_jax.experiments.config_checks import has_head, has_latent
from alignx_jax.experiments.experiment import Experiment, make_formatting
from alignx_jax.personas.persona import HistoryPolicy
from alignx_jax.training import hosts
from alignx_jax.training.reference import LogProbs, posterior_stream


def policy_name(config) -> str:
  """What a config's policy is called in results."""
  if config.objective.name == "pba" and config.bridge.kind == "head":
    return "pba_head"
  if config.objective.name == "pba" and config.bridge.inferred_by:
    return "pba_by_head"
  return config.objective.name


def base_scorer(experiment: Experiment) -> Scorer:
  """Scores of the model that training starts from on the test pairs: the reference."""
  name = "start" if experiment.config.bridge.start else "base"
  return text_scorer(experiment, name, experiment.load_base())


def base_results(experiment: Experiment, base: Scorer, policies) -> list[dict]:
  """Rows of results.json that need no training: the length control and the base.

  Args:
    policies: names of those that it is compared with.
  """
  return [length_control(experiment.test), *evaluate_base(base, policies)]


def policy_results(
  experiment: Experiment, policy: "Scorer | BridgeScorer", base: Scorer
) -> list[dict]:
  """Rows of results.json of a trained policy, with its controls."""
  name, protocols = policy_name(experiment.config), experiment.config.eval.protocols
  return evaluate_policy(name, policy, base, protocols=protocols)


def policy_scorer(
  experiment: Experiment, params: nnx.State, workdir: Path
) -> "Scorer | BridgeScorer":
  """Scores of trained parameters on the test pairs.

  Args:
    workdir: of the run, where the temperature of a learned bridge is kept.
  """
  if has_head(experiment.config):
    return bridge_scorer(experiment, params, workdir)
  if has_latent(experiment.config):
    return latent_scorer(experiment, params)
  return text_scorer(experiment, policy_name(experiment.config), params)


def measure(experiment: Experiment, params: nnx.State, workdir: Path) -> None:
  """Evaluates one run: controls, base and policy, and what its bridge or encoder infers.

  Writes results.json (and preferences.json, or latent.json) and prints them; of several processes
  the first does.
  """
  base = base_scorer(experiment)
  name = policy_name(experiment.config)
  results = base_results(experiment, base, [name])
  policy = policy_scorer(experiment, params, workdir)
  results += policy_results(experiment, policy, base)
  preferences = []
  if has_head(experiment.config):
    preferences = preference_rows(experiment, policy.inferred_XPK)
  latents = latents_of(experiment, params) if has_latent(experiment.config) else []
  if not hosts.is_first():
    return
  write_results(workdir / "results.json", results)
  print(format_table(results))
  if preferences:
    write_results(workdir / "preferences.json", preferences)
    print(f"\n{format_preference_table(preferences)}")
  if latents:
    write_results(workdir / "latent.json", latents)
    print(f"\n{summarise(latents)}")


def validation_accuracy(experiment: Experiment) -> Callable[[nnx.State], float]:
  """All parameters to matched accuracy on the validation split, as config.eval.every asks.

  Raises:
    ValueError: there is no validation split.
  """
  if not len(experiment.validation):
    raise ValueError(
      "config.eval.every evaluates on the validation split, and this data has none; set it to 0."
    )
  experiment = dataclasses.replace(experiment, test=experiment.validation)
  name, head = policy_name(experiment.config), has_head(experiment.config)
  condition, latent = CONDITIONS[name][0], has_latent(experiment.config)
  reference_XN = base_scorer(experiment).score("none" if head or latent else condition)

  def evaluate(params) -> float:
    if head:
      inferred_XPK = softmax(inferred_logits(experiment, params, experiment.test))
      policy = _bridge_scorer(experiment, params, inferred_XPK)
    elif latent:
      policy = latent_scorer(experiment, params)
    else:
      policy = text_scorer(experiment, name, params)
    ratio_XN = policy.score(condition) - reference_XN
    margin_X = (ratio_XN[:, 0] - ratio_XN[:, 1])[np.isfinite(ratio_XN).all(axis=1)]
    return float((margin_X > 0).mean())

  return evaluate


def bridge_scorer(
  experiment: Experiment,
  params: nnx.State,
  workdir: Path,
  *,
  history: HistoryPolicy = HistoryPolicy(),
) -> BridgeScorer:
  """Scores of a policy with a learned bridge on the test pairs, by P̃ that its head infers.

  Args:
    history: what the head sees of a persona.
  """
  logits_XPK = inferred_logits(experiment, params, experiment.test, history=history)
  temperature = temperature_of(experiment, params, workdir)
  return _bridge_scorer(experiment, params, softmax(logits_XPK, temperature))


def _bridge_scorer(experiment, params, inferred_XPK) -> BridgeScorer:
  return BridgeScorer(
    "pba_head",
    LogProbs.of(experiment, params),
    experiment.test,
    experiment.formatting,
    experiment.config.eval.rows,
    inferred_XPK,
  )


def latent_scorer(experiment: Experiment, params: nnx.State) -> LatentScorer:
  """Scores of a policy with a latent user variable on the test pairs."""
  log_probs, rows = LogProbs.of(experiment, params), experiment.config.eval.rows
  return LatentScorer("vpl", log_probs, experiment.test, experiment.formatting, rows)


def latents_of(experiment: Experiment, params: nnx.State) -> list[dict]:
  """What a latent user variable says of the users of the test split, by dimension."""
  formatting = dataclasses.replace(experiment.formatting, history=HistoryPolicy())
  loader = Loader(experiment.test, formatting, rows=experiment.config.eval.rows)
  log_probs = LogProbs.of(experiment, params)
  return latent_results(posterior_stream(log_probs, loader, describe="inferring latents"))


def text_scorer(experiment: Experiment, name: str, params: nnx.State) -> Scorer:
  """Scores of a policy, or of the base, that reads text."""
  # Whatever the condition it trains on, a policy is compared with what reads the whole persona.
  config = experiment.config.copy_and_resolve_references()
  config.objective.name = "ica"
  formatting = make_formatting(config, experiment.formatting.tokenizer, experiment.formatting.space)
  log_probs = LogProbs.of(experiment, params)
  return Scorer(name, log_probs, experiment.test, formatting, config.eval.rows)


def few_acts_results(
  name: str, policy: "Scorer | BridgeScorer", base: Scorer, acts: int
) -> list[dict]:
  """A policy's matched accuracy where it sees so many acts of each user, and their description.

  Args:
    name: of the policy.
    policy: reads personas as text; or P̃ that was inferred from so many acts.
  """
  ratio = matched_ratio(policy, base, HistoryPolicy("fixed", acts))
  return accuracy_rows(name, f"{acts} acts", "matched", policy.examples, ratio)


def told_results(name: str, policy: Scorer, base: Scorer, told) -> list[dict]:
  """A text policy's matched accuracy where it is told the profiles that examples have.

  Args:
    told: the scorers' examples with such profiles.
  """
  scores = (
    dataclasses.replace(scorer, examples=told).score("profile") for scorer in (policy, base)
  )
  return accuracy_rows(name, "profile", "matched", told, next(scores) - next(scores))
