"""A prepared set in training: read on demand, mixed, in the rows proposed for it."""

import dataclasses
import json
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from alignx_jax.data.alignx import from_features, get_config, make_features, to_features
from alignx_jax.data.prepared import open_prepared
from alignx_jax.data.preparing import prepare
from alignx_jax.data.proposals import write_proposals
from alignx_jax.data.records import Example, Profiled
from alignx_jax.experiments import experiment as experiments
from alignx_jax.experiments.measuring import measure
from alignx_jax.personas.persona import Persona, UserComment
from alignx_jax.personas.simulator import simulate_record
from alignx_jax.training.reference import cache_key
from configs import base
from tests.small_records import small_config, write_small_records

SOURCES = {"Reddit": 30, "HelpSteer2": 6}


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
  folder = tmp_path_factory.mktemp("prepared")
  files, start = [], 0
  for source, size in SOURCES.items():
    values = [simulate_record(i, split="train", seed=9) for i in range(start, start + size)]
    (folder / f"{source}.json").write_text(json.dumps(values), encoding="utf-8")
    files, start = [*files, str(folder / f"{source}.json")], start + size
  prepare(files, folder / "set", get_config("train", validation_share=0.3), shard_records=16)
  return str(folder / "set")


@pytest.fixture
def config(directory):
  config = base.get_config()
  config.model.weights = "preset:tiny"
  config.data.path = directory
  config.regions.update(context=1536, response=256, examples=2)
  config.train.update(rows=2, epochs=2, devices=1)
  config.optimizer.learning_rate = 1e-4
  return config


def test_training_and_validation_are_the_sets_own(directory, config):
  experiment = experiments.load_experiment(config)
  splits = open_prepared(directory)
  assert [e.id for e in experiment.train] == [e.id for e in splits["train"]]
  assert [e.id for e in experiment.test] == [e.id for e in splits["validation"]]
  config.data.train_records, config.data.test_records = 5, 3
  experiment = experiments.load_experiment(config)
  assert (len(experiment.train), len(experiment.test)) == (5, 3)


def test_a_temperature_lets_small_sources_come_more_often(config):
  def share(temperature):
    config.data.temperature = temperature
    loader = experiments.training_loader(experiments.load_experiment(config))
    ids = [loader.examples[loader.stream[i].example].id for i in range(loader.stream_length)]
    return sum(name.startswith("HelpSteer2") for name in ids) / len(ids)

  plain, even = share(1.0), share(1e6)
  assert plain < 0.3 and even == pytest.approx(0.5, abs=0.03)


def test_a_temperature_weighs_sources_whatever_profiles_are_told(config):
  config.data.temperature = 2.0
  experiment = experiments.load_experiment(config)
  told = Profiled(experiment.train, ["likes tea"] * len(experiment.train))
  loader = experiments.training_loader(dataclasses.replace(experiment, train=told))
  plain = experiments.training_loader(experiment)
  indices = range(plain.stream_length)
  assert [loader.stream[i] for i in indices] == [plain.stream[i] for i in indices]
  assert loader.examples[3].profile == "likes tea"


def test_directions_that_are_not_all_known_are_stored_as_such():
  space = get_config("uf_p_4").space
  directions = [np.float32([0, 0.5, 1, np.nan]), None, np.float32([np.nan, 1, 1, 0])]
  persona = Persona(tuple(UserComment("a", "b", d) for d in directions))
  features = make_features(space)
  for known in directions:
    example = Example("f:0", "post", "chosen", "rejected", persona, known)
    stored = features.encode_example(to_features(example, "source", space))
    read = from_features(jax.tree.map(_as_read, stored))
    acts = [act.directions for act in read.persona.comments]
    for found, expected in zip([read.directions, *acts], [known, *directions], strict=True):
      assert (found is None) == (expected is None)
      if expected is not None:
        np.testing.assert_array_equal(found, expected)


def _as_read(value):
  """Text as a TFDS data source gives it."""
  if not (isinstance(value, np.ndarray) and value.dtype == object):
    return value
  texts = [text.encode() for text in value.ravel()]
  return texts if value.ndim else texts[0]


def test_a_temperature_needs_sources(config):
  config.data.path, config.data.temperature = "simulated", 2.0
  config.data.train_records = config.data.test_records = 2
  with pytest.raises(ValueError, match="config.data.temperature weighs the sources"):
    experiments.training_loader(experiments.load_experiment(config))


def test_proposed_regions_are_used_by_name(directory, config):
  experiment = experiments.load_experiment(config)
  splits = open_prepared(directory)
  write_proposals(directory, splits, experiment.formatting, layouts=(8192,), sample=50)
  config.regions.layout = "8192"
  proposed = experiments.load_experiment(config)
  assert proposed.formatting.regions.layout == 8192
  assert proposed.with_objective("pba").formatting.regions != proposed.formatting.regions
  config.regions.layout = "1234"
  with pytest.raises(ValueError, match=r"no regions for rows of 1234 tokens.*\(it has 8192\)"):
    experiments.load_experiment(config)


@pytest.mark.slow
def test_a_run_on_a_prepared_set_resumes_and_evaluates(config, tmp_path):
  config.train.steps = 3
  config.train.checkpoint_every = 1
  config.eval.protocols = ("matched",)
  config.eval.rows, config.data.test_records = 2, 2
  experiment = experiments.load_experiment(config)
  params = experiments.run_training(experiment, tmp_path).params
  measure(experiment, params, tmp_path)
  rows = json.loads((tmp_path / "results.json").read_text())
  assert {row["policy"] for row in rows} == {"length", "base", "ica"}
  assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 3


def test_the_cache_key_follows_what_is_said(directory, config):
  experiment = experiments.load_experiment(config)

  def key(examples):
    loader = experiments.training_loader(experiment)
    loader.examples = examples
    return cache_key(loader, experiment.model, "weights")

  splits = open_prepared(directory)
  assert key(splits["train"]) == key(pickle.loads(pickle.dumps(splits["train"])))
  assert len({key(splits["train"]), key(splits["train"][:9]), key(splits["validation"])}) == 3


def test_reading_imports_no_tensorflow(directory):
  code = (
    "import sys; from alignx_jax.data.prepared import open_prepared\n"
    f"assert open_prepared({directory!r})['train'][3].post\n"
    "assert 'tensorflow' not in sys.modules\n"
  )
  subprocess.run([sys.executable, "-c", code], check=True)


def test_what_is_not_whole_is_refused_with_the_remedy(tmp_path):
  with pytest.raises(FileNotFoundError, match="no data_card.json.*it goes on where it stopped"):
    open_prepared(str(tmp_path))


@pytest.mark.parametrize("harm", [lambda path: path.unlink(), lambda path: path.write_bytes(b"")])
def test_a_shard_that_vanished_or_is_damaged_is_named(directory, tmp_path, harm):
  copy = Path(shutil.copytree(directory, tmp_path / "set"))
  shards = sorted(copy.glob("*-train.array_record-*"))
  harm(shards[0])
  with pytest.raises(OSError, match=r"Record \d+ of the split 'train' in .*set cannot be read"):
    list(open_prepared(str(copy))["train"])


def test_a_shard_that_vanishes_while_a_run_reads_is_named(tmp_path):
  records = write_small_records(tmp_path / "records.json")
  options = get_config("train", validation_share=0.3)
  prepare([str(records)], tmp_path / "set", options, shard_records=4)
  config = small_config(tmp_path / "set")
  config.train.epochs = 9
  loader = experiments.training_loader(experiments.load_experiment(config))
  batches = loader.batches(loader.start())
  assert (next(batches).rows.example_BE >= 0).any()
  for shard in (tmp_path / "set").glob("*-train.array_record-*"):
    shard.unlink()
  vars(loader.examples).pop("_records")  # what is open or was read ahead would not be missed
  with pytest.raises(OSError, match=r"Record \d+ of the split 'train' in .*set cannot be read"):
    list(batches)
