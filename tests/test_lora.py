"""LoRA: starts as the base, trains the factors alone, merges into what it was."""

import json

import jax
import numpy as np
import pytest
from flax import nnx

from alignx_jax.experiments import experiment as experiments
from alignx_jax.models.decoder import Decoder
from alignx_jax.models.lora import PROJECTIONS, add_lora, merge_lora, split_trainable, without_lora
from alignx_jax.models.presets import get_architecture
from alignx_jax.training.metrics import read_metrics
from alignx_jax.training.reference import fingerprint
from configs import base
from tests.small_records import small_record


@pytest.fixture
def config(tmp_path):
  path = tmp_path / "records.json"
  path.write_text(json.dumps([small_record(i) for i in range(48)]))
  config = base.get_config()
  config.model.weights = "preset:tiny8"
  config.data.path = str(path)
  config.history.policy = "all"
  config.regions.update(context=512, response=32, examples=3)
  config.lora.update(rank=4, alpha=8.0)
  config.reference.kind = "online"
  config.optimizer.learning_rate = 1e-2
  config.train.update(rows=2, devices=1, checkpoint_every=2)
  config.eval.rows = 2
  return config


def adapted(seed=0):
  """A decoder whose adapters change something, and hidden states of a few tokens."""
  model = Decoder(get_architecture("tiny8"), rngs=nnx.Rngs(seed))
  add_lora(model, rank=3, alpha=6.0, rngs=nnx.Rngs(seed + 1))
  rng = np.random.default_rng(seed)
  for name in PROJECTIONS:
    b = getattr(model.blocks, f"{name}_lora_b")
    b[...] = 0.05 * rng.normal(size=b.shape).astype(np.float32)
  return model


def hidden(model):
  tokens = np.random.default_rng(0).integers(320, size=(2, 20))
  return model(tokens, np.broadcast_to(np.arange(20), (2, 20)), np.ones_like(tokens))


def test_merged_is_adapted_and_without_is_the_base():
  model = adapted()
  expected = hidden(model)
  plain = Decoder(get_architecture("tiny8"), rngs=nnx.Rngs(0))
  off = nnx.merge(nnx.graphdef(model), without_lora(nnx.state(model)))
  np.testing.assert_array_equal(hidden(off), hidden(plain))
  assert np.abs(expected - hidden(plain)).max() > 1e-2
  merge_lora(model)
  assert jax.tree.structure(nnx.state(model)) == jax.tree.structure(nnx.state(plain))
  np.testing.assert_allclose(hidden(model), expected, atol=1e-5)


def test_an_adapter_does_not_change_the_fingerprint_of_the_base():
  plain = Decoder(get_architecture("tiny8"), rngs=nnx.Rngs(0))
  assert fingerprint(nnx.state(adapted())) == fingerprint(nnx.state(plain))


def test_exactly_one_factor_starts_at_zero():
  model = Decoder(get_architecture("tiny8"), rngs=nnx.Rngs(0))
  add_lora(model, rank=3, alpha=6.0, rngs=nnx.Rngs(1))
  factors, _ = split_trainable(nnx.state(model))
  flat = {jax.tree_util.keystr(p): x for p, x in jax.tree_util.tree_leaves_with_path(factors)}
  assert len(flat) == 2 * len(PROJECTIONS)
  for name, value in flat.items():
    assert bool(np.any(value)) == ("_lora_a" in name)


@pytest.mark.slow
def test_online_training_starts_at_log_two_and_changes_the_factors_alone(config, tmp_path):
  experiment = experiments.load_experiment(config)
  result = experiments.run_training(experiment, tmp_path / "run")
  lines = read_metrics(tmp_path / "run")
  assert lines[0]["loss"] == pytest.approx(np.log(2), abs=1e-7)
  assert np.mean([line["loss"] for line in lines[-3:]]) < 0.65
  assert not list((tmp_path / "run").rglob("reference_*.npz"))
  base_params = experiment.load_base()
  before, after = split_trainable(base_params), split_trainable(result.params)
  assert all(
    bool(np.any(x != y)) for x, y in zip(*map(jax.tree.leaves, (before[0], after[0])), strict=True)
  )
  for x, y in zip(*map(jax.tree.leaves, (before[1], after[1])), strict=True):
    np.testing.assert_array_equal(x, y)
  # The checkpoint holds the factors; with the base they are the trained model.
  again = experiments.trained_params(experiment, tmp_path / "run")
  for x, y in zip(*map(jax.tree.leaves, (again, result.params)), strict=True):
    np.testing.assert_array_equal(x, y)


@pytest.mark.slow
def test_the_cached_reference_is_the_online_one(config, tmp_path):
  experiments.run_training(experiments.load_experiment(config), tmp_path / "online")
  config.reference.kind = "cached"
  experiments.run_training(experiments.load_experiment(config), tmp_path / "cached")
  online, cached = (
    [line["loss"] for line in read_metrics(tmp_path / n)] for n in ("online", "cached")
  )
  np.testing.assert_allclose(online, cached, atol=1e-5)


def test_an_online_reference_needs_an_adapter(config, tmp_path):
  config.lora.rank = 0
  with pytest.raises(ValueError, match=r"set config\.lora\.rank, or config\.reference\.kind"):
    experiments.run_training(experiments.load_experiment(config), tmp_path / "run")
