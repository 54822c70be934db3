"""A trained run as a Hugging Face directory, and read back from there."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx

from alignx_jax.data.tokenizers import load_tokenizer
from alignx_jax.experiments import experiment as experiments
from alignx_jax.experiments.export import export
from alignx_jax.models.lora import merge_lora
from alignx_jax.models.peft import load_adapter
from alignx_jax.models.pretrained import load_decoder
from alignx_jax.models.tokenizer_files import write_tokenizer_files
from alignx_jax.training.metrics import read_metrics
from configs import base

SIMULATED_BASE = Path(__file__).parents[1] / "alignx_jax/models/simulated_base"
WEIGHTS = {"config.json", "model.safetensors"}
TOKENIZER = {"tokenizer.json", "tokenizer_config.json", "generation_config.json"}


@pytest.fixture
def changes(tmp_path):
  """What makes of configs/base.py a run of seconds."""
  records = [
    {"prompt": f"post {i}", "chosen": "sun", "rejected": "rain", "Demographic Information": "shy"}
    for i in range(8)
  ]
  path = tmp_path / "records.json"
  path.write_text(json.dumps(records))
  return {
    "model.weights": "preset:tiny",
    "data.path": str(path),
    "regions.context": 256,
    "regions.response": 32,
    "regions.examples": 2,
    "optimizer.learning_rate": 1e-2,
    "train.steps": 2,
    "train.rows": 1,
    "train.devices": 1,
    "eval.rows": 1,
  }


@pytest.fixture
def config(changes):
  config = base.get_config()
  config.update_from_flattened_dict(changes)
  return config


def _train(config, workdir):
  """A run's model with its trained parameters, and the experiment."""
  experiment = experiments.load_experiment(config)
  experiments.run_training(experiment, workdir)
  losses = [line["loss"] for line in read_metrics(workdir)]
  assert abs(losses[0] - np.log(2)) < 1e-6 and abs(losses[-1] - np.log(2)) > 1e-3  # it has moved
  params = experiments.trained_params(experiment, workdir)
  return nnx.merge(nnx.graphdef(experiment.model), params), experiment


def _assert_same_weights(a, b):
  for x, y in zip(jax.tree.leaves(nnx.state(a)), jax.tree.leaves(nnx.state(b)), strict=True):
    np.testing.assert_array_equal(x, y)


def test_the_command_writes_the_trained_weights(config, changes, tmp_path):
  model, experiment = _train(config, tmp_path / "run")
  done = subprocess.run(
    [
      *(sys.executable, "-m", "alignx_jax.export", "--config=configs/base.py"),
      *(f"--workdir={tmp_path / 'run'}", f"--output={tmp_path / 'out'}"),
      *(f"--config.{name}={value}" for name, value in changes.items()),
    ],
    capture_output=True,
    text=True,
    timeout=280,
  )
  assert done.returncode == 0, done.stderr[-3000:]
  assert done.stdout.endswith(f"Written: {tmp_path / 'out'}\n")
  assert {path.name for path in (tmp_path / "out").iterdir()} == WEIGHTS | TOKENIZER
  exported = load_decoder(tmp_path / "out")
  assert exported.arch == model.arch
  _assert_same_weights(exported, model)

  text = "Tea? <|im_end|> 世界"
  again = load_tokenizer(tmp_path / "out")
  assert again.encode(text) == experiment.formatting.tokenizer.encode(text)


def test_a_run_without_a_checkpoint_is_refused(config, tmp_path):
  with pytest.raises(FileNotFoundError, match="has no checkpoint; train there first"):
    export(config, tmp_path / "run", tmp_path / "out")
  assert not (tmp_path / "out").exists()


def test_neither_the_run_nor_its_base_is_overwritten(config, tmp_path):
  config.model.weights = str(tmp_path / "base")
  for taken in (tmp_path / "run", tmp_path / "base" / "x" / ".."):
    with pytest.raises(ValueError, match="itself; give another directory"):
      export(config, tmp_path / "run", taken)


@pytest.mark.slow
def test_files_beside_the_weights_are_copied_and_the_whole_starts_another_run(config, tmp_path):
  config.model.weights = str(tmp_path / "base")
  shutil.copytree(SIMULATED_BASE, tmp_path / "base")
  (tmp_path / "base" / "chat_template.jinja").write_text("{{ messages }}")
  (tmp_path / "base" / "generation_config.json").write_text('{"eos_token_id": [1, 0]}')
  model, _ = _train(config, tmp_path / "run")
  export(config, tmp_path / "run", tmp_path / "out")
  for name in TOKENIZER | {"chat_template.jinja"}:
    assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "base" / name).read_bytes()
  config.model.weights = str(tmp_path / "out")
  again = experiments.load_experiment(config)
  _assert_same_weights(nnx.merge(nnx.graphdef(again.model), again.load_base()), model)


@pytest.mark.slow
def test_an_adapter_is_merged_and_written_beside(config, tmp_path):
  config.lora.rank = 2
  model, _ = _train(config, tmp_path / "run")
  export(config, tmp_path / "run", tmp_path / "out")
  adapter = load_adapter(tmp_path / "out" / "adapter", model.arch)
  assert (adapter.rank, adapter.alpha, adapter.base) == (2, config.lora.alpha, "preset:tiny")
  for name, pair in adapter.factors.items():
    for factor, value in zip("ab", pair, strict=True):
      np.testing.assert_array_equal(getattr(model.blocks, f"{name}_lora_{factor}")[...], value)
  merge_lora(model)
  _assert_same_weights(load_decoder(tmp_path / "out"), model)


# ------------------------------------------------------------------ the tokenizer's files


@pytest.mark.slow
def test_a_gguf_gives_its_tokenizer(smollm2_path, tmp_path):
  tokenizer = load_tokenizer(smollm2_path)
  write_tokenizer_files(tmp_path, tokenizer, smollm2_path, max_positions=8192)
  assert {path.name for path in tmp_path.iterdir()} == TOKENIZER | {"chat_template.jinja"}
  again = load_tokenizer(tmp_path)
  assert again.special_ids == tokenizer.special_ids
  assert (again.bos_id, again.eos_id) == (tokenizer.bos_id, tokenizer.eos_id)
  texts = ["In 1984, 10,000 people…", "<|im_end|> is text", "Grüße 世界 👩‍👩‍👧", "  a\n\n b"]
  assert again.encode_batch(texts) == tokenizer.encode_batch(texts)
  template = (tmp_path / "chat_template.jinja").read_text()
  assert "<|im_start|>" in template
  ids = json.loads((tmp_path / "generation_config.json").read_text())
  assert ids == {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id}


def test_another_models_files_do_not_remain_and_the_sources_own_stay(tmp_path):
  (tmp_path / "special_tokens_map.json").write_text("{}")
  (tmp_path / "chat_template.jinja").write_text("other")
  write_tokenizer_files(tmp_path, load_tokenizer("bytes"), None, max_positions=64)
  assert {path.name for path in tmp_path.iterdir()} == TOKENIZER
  before = (tmp_path / "tokenizer.json").read_bytes()
  for source in (tmp_path, tmp_path / "tokenizer.json"):  # onto itself
    write_tokenizer_files(tmp_path, load_tokenizer(tmp_path), source, max_positions=64)
  assert (tmp_path / "tokenizer.json").read_bytes() == before
