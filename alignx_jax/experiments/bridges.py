"""What a learned bridge infers: calibrated, measured, and told to other policies as text."""

import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from absl import logging
from flax import nnx
from safetensors.numpy import save_file

from alignx_jax.data.loader import Loader
from alignx_jax.data.records import Example, Profiled
from alignx_jax.evaluation.calibration import (
  fit_temperature,
  frequencies,
  majority,
  preference_results,
  softmax,
)
from alignx_jax.experiments.config_checks import has_head
from alignx_jax.experiments.experiment import Experiment, restored_params
from alignx_jax.files import write_text
from alignx_jax.personas.distribution import Preferences
from alignx_jax.personas.persona import HistoryPolicy
from alignx_jax.personas.preferences import NEUTRAL, PreferenceSpace
from alignx_jax.training.bridge import SPACE, label_sample
from alignx_jax.training.checksums import array_digest
from alignx_jax.training.reference import LogProbs, infer_stream

CALIBRATION = "calibration.json"  # in the workdir of a run with a learned bridge


def inferred_logits(
  experiment: Experiment, params: nnx.State, examples, *, history: HistoryPolicy = HistoryPolicy()
) -> np.ndarray:
  """Log-odds of P̃ [X, P, K] that a learned bridge infers, NaN where an example was refused.

  Args:
    history: what the head sees of a persona.
  """
  formatting = dataclasses.replace(experiment.formatting, history=history)
  loader = Loader(examples, formatting, rows=experiment.config.eval.rows)
  return infer_stream(LogProbs.of(experiment, params), loader, describe="inferring preferences")


def temperature_of(experiment: Experiment, params: nnx.State, workdir: Path) -> float:
  """The temperature of a run's P̃, fitted on the validation split and kept in its workdir.

  1 where there is no labelled validation split. It is of these parameters: fitted anew when the
  run has gone on. Where the experiment has no validation split at all, nothing is kept: it may have
  been left out.
  """
  path = workdir / CALIBRATION
  weights = array_digest(params)
  if path.exists():
    kept = json.loads(path.read_text(encoding="utf-8"))
    if kept.get("weights", weights) == weights:  # without: set by hand
      return float(kept["temperature"])
  if not len(experiment.validation):
    logging.warning(
      "%s: no temperature of these weights, no validation split: 1 is taken.", workdir
    )
    return 1.0
  labels_XP = directions_of(experiment, experiment.validation)
  found = {"temperature": 1.0, "users": 0, "weights": weights}
  if np.isfinite(labels_XP).any():
    logits_XPK = inferred_logits(experiment, params, experiment.validation)
    known_X = np.isfinite(logits_XPK).all(axis=(1, 2))
    found["temperature"] = fit_temperature(logits_XPK[known_X], labels_XP[known_X])
    found["users"] = int(np.isfinite(labels_XP[known_X]).any(axis=1).sum())
  write_text(path, json.dumps(found) + "\n")
  return found["temperature"]


def directions_of(experiment: Experiment, examples) -> np.ndarray:
  """Preference directions [X, P] of examples in the space of the bridge, NaN where unknown."""
  labels_XP = np.full((len(examples), len(experiment.space)), np.nan)
  for i, example in enumerate(examples):
    labels_P = experiment.formatting.labels(example.directions)
    if labels_P is not None:
      labels_XP[i] = np.where(labels_P < 0, np.nan, labels_P / 2)
  return labels_XP


def preference_rows(experiment: Experiment, inferred_XPK: np.ndarray) -> list[dict]:
  """How well P̃ is inferred on the test split, beside what needs no model; [] without labels.

  `labels averaged` is the release's bridge, which reads the labels of the history; without them
  it says nothing, and is then `labels hidden`.
  """
  labels_XP = directions_of(experiment, experiment.test)
  refused_X = ~np.isfinite(inferred_XPK).all(axis=(1, 2))
  labels_XP[refused_X] = np.nan
  if not np.isfinite(labels_XP).any():
    return []
  train_XP = label_sample(experiment.train, experiment.formatting) / 2
  train_XP = np.where(train_XP < 0, np.nan, train_XP)
  neutral_P = np.full(len(experiment.space), NEUTRAL)
  inferred_XPK = np.where(refused_X[:, None, None], 1 / 3, inferred_XPK)
  usual_XPK = np.broadcast_to(frequencies(train_XP), inferred_XPK.shape)
  predictors = {"head": inferred_XPK, "frequencies": usual_XPK}
  averaged = [_averaged(experiment, example) for example in experiment.test]
  if any(directions_P is not None for directions_P in averaged):
    predictors["labels averaged"] = np.stack([neutral_P if d is None else d for d in averaged])
  predictors |= {"labels hidden": neutral_P, "majority": majority(train_XP)}
  return preference_results(predictors, labels_XP)


def _averaged(experiment: Experiment, example) -> np.ndarray | None:
  """What the labels of an example's history say, as the release averages them."""
  known = [act.directions for act in example.persona.history if act.directions is not None]
  if not known:
    return None
  labels_P = experiment.formatting.labels(experiment.formatting.space.aggregate(known))
  return np.where(labels_P < 0, NEUTRAL, labels_P / 2)


def profiled(
  examples: Sequence[Example], inferred_XPK: np.ndarray, space: PreferenceSpace, *, threshold: float
) -> Profiled:
  """Examples with their P̃ as profiles: as text any model can read it.

  Args:
    inferred_XPK: of each example in the space, NaN where it could not be inferred.
    threshold: probability from which a pole is stated.
  """

  def text(inferred_PK):
    if not np.isfinite(inferred_PK).all():
      return None  # refused, and counted where it was
    return Preferences(space, inferred_PK).verbalise(threshold)

  return Profiled(examples, [text(inferred_PK) for inferred_PK in inferred_XPK])


def teller(experiment: Experiment) -> Callable[[Sequence[Example]], Profiled]:
  """What gives examples the P̃ that the run of config.bridge.inferred_by infers, as text."""
  config = experiment.config
  head = experiment.of_run(config.bridge.inferred_by)
  params = restored_params(head)
  temperature, threshold = temperature_of(head, params, head.workdir), config.bridge.threshold

  def told(examples):
    inferred_XPK = softmax(inferred_logits(head, params, examples), temperature)
    return profiled(examples, inferred_XPK, head.space, threshold=threshold)

  return told


def told_by(experiment: Experiment) -> Experiment:
  """The experiment as config.bridge.inferred_by says: with P̃ of that run's bridge, if any."""
  config = experiment.config
  if config.objective.name != "pba" or has_head(config) or not config.bridge.inferred_by:
    return experiment
  told = teller(experiment)
  splits = ["train", "test"] + ["validation"] * bool(config.eval.every)
  splits = [split for split in splits if len(getattr(experiment, split))]
  return dataclasses.replace(
    experiment,
    formatting=dataclasses.replace(experiment.formatting, condition="profile"),
    **{split: told(getattr(experiment, split)) for split in splits},
  )


def save_bridge(bridge, space: PreferenceSpace, directory: Path) -> None:
  """Writes the parameters of a models.bridge.Bridge, float32, and the space that they are of."""
  tensors = {
    name: np.asarray(leaf[...], np.float32) for name, leaf in nnx.to_flat_state(nnx.state(bridge))
  }
  save_file(
    {".".join(map(str, name)): value for name, value in tensors.items()},
    directory / "bridge.safetensors",
  )
  write_text(directory / SPACE, space.to_json())
