"""Baselines in the same harness: universal DPO, few-shot prompting, and how tables name them."""

import json

import numpy as np
import pytest

from alignx_jax.experiments import experiment as experiments
from alignx_jax.experiments import measuring
from alignx_jax.training.metrics import read_metrics
from tests.small_records import small_config, write_small_records


@pytest.fixture(scope="module")
def universal(tmp_path_factory):
  """A short run of universal DPO on drawn histories, evaluated."""
  directory = tmp_path_factory.mktemp("dpo")
  config = small_config(write_small_records(directory / "records.json"))
  config.objective.name = "dpo"
  config.train.epochs = 2
  experiment = experiments.load_experiment(config)
  params = experiments.run_training(experiment, directory / "run").params
  measuring.measure(experiment, params, directory / "run")
  return experiment, directory / "run"


def test_universal_dpo_reads_nothing_of_the_user(universal):
  experiment, _ = universal
  loader = experiments.training_loader(experiment)
  for position in (0, 7):
    place, ids = loader.tokenised(position)
    example = experiment.train[place.example]
    text = bytes(i for i in ids.context if i < 256).decode()  # without the special tokens
    assert example.post in text
    assert not any(act.comment in text for act in example.persona.comments)


def test_universal_dpo_starts_at_its_reference_which_is_scored_once_for_all_epochs(universal):
  experiment, workdir = universal
  lines = read_metrics(workdir)
  assert lines[0]["loss"] == pytest.approx(np.log(2), abs=1e-6)
  assert lines[-1]["loss"] < lines[0]["loss"]
  assert experiment.formatting.history.random  # what is drawn does not enter the prompt
  (file,) = (workdir / "reference").glob("*.npz")
  assert np.load(file)["scores"].shape == (len(experiment.train), 2)


def test_universal_dpo_is_measured_without_a_persona_beside_the_length_control(universal):
  _, workdir = universal
  rows = json.loads((workdir / "results.json").read_text())
  found = [(row["policy"], row["condition"], row["protocol"]) for row in rows]
  assert found == [("length", "length", "none"), ("dpo", "none", "matched")]
