"""Adapters in PEFT's layout; what PEFT itself makes of them is in test_transformers.py."""

import json
import re

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from alignx_jax.models.peft import load_adapter, save_adapter
from alignx_jax.models.presets import PRESETS

ARCH = PRESETS["tiny"]  # width 32, 4 heads and 2 key/value heads of 8, feed-forward 64
SIZES = {
  "q_DHA": (32, 32),
  "k_DKA": (32, 16),
  "v_DKA": (32, 16),
  "o_HAD": (32, 32),
  "gate_DF": (32, 64),
  "up_DF": (32, 64),
  "down_FD": (64, 32),
}


def _factors(names=SIZES, rank=3):
  rng = np.random.default_rng(0)

  def random(*shape):
    return rng.normal(size=shape).astype(np.float32)

  return {
    name: (random(2, SIZES[name][0], rank), random(2, rank, SIZES[name][1])) for name in names
  }


@pytest.fixture
def saved(tmp_path):
  save_adapter(_factors(), ARCH, tmp_path, rank=3, alpha=6.0, base="some/model")
  return tmp_path


@pytest.mark.parametrize("names", [tuple(SIZES), ("q_DHA", "v_DKA")])
def test_an_adapter_is_read_as_it_was_written(tmp_path, names):
  factors = _factors(names)
  save_adapter(factors, ARCH, tmp_path, rank=3, alpha=6.0, base="some/model")
  adapter = load_adapter(tmp_path, ARCH)
  assert (adapter.rank, adapter.alpha, adapter.base) == (3, 6.0, "some/model")
  assert adapter.factors.keys() == factors.keys()
  for name, pair in factors.items():
    for x, y in zip(pair, adapter.factors[name], strict=True):
      np.testing.assert_array_equal(x, y)


def test_names_shapes_and_settings_are_pefts(saved):
  tensors = load_file(saved / "adapter_model.safetensors")
  assert len(tensors) == 2 * 7 * 2
  prefix = "base_model.model.model.layers.1"
  assert tensors[f"{prefix}.mlp.down_proj.lora_A.weight"].shape == (3, 64)
  assert tensors[f"{prefix}.self_attn.k_proj.lora_B.weight"].shape == (16, 3)
  a, b = _factors()["k_DKA"]
  np.testing.assert_array_equal(tensors[f"{prefix}.self_attn.k_proj.lora_A.weight"], a[1].T)
  np.testing.assert_array_equal(tensors[f"{prefix}.self_attn.k_proj.lora_B.weight"], b[1].T)
  config = json.loads((saved / "adapter_config.json").read_text())
  assert {key: config[key] for key in ("peft_type", "task_type", "r", "lora_alpha", "bias")} == {
    "peft_type": "LORA",
    "task_type": "CAUSAL_LM",
    "r": 3,
    "lora_alpha": 6,
    "bias": "none",
  }
  assert set(config["target_modules"]) == {
    *("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
  }


@pytest.mark.parametrize(
  ("factors", "message"),
  [
    ({}, "no factors"),
    ({"embedding_VD": (np.ones(1), np.ones(1))}, "'embedding_VD' is no projection"),
    (_factors(["q_DHA"], rank=4), r"Factor A of 'q_DHA' has shape \[2, 32, 4\]; expected.*32, 3"),
  ],
)
def test_factors_that_do_not_fit_are_not_written(tmp_path, factors, message):
  with pytest.raises(ValueError, match=message):
    save_adapter(factors, ARCH, tmp_path, rank=3, alpha=6.0, base="some/model")
  assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
  ("setting", "value"),
  [
    ("peft_type", "IA3"),
    ("use_dora", True),
    ("use_rslora", True),
    ("fan_in_fan_out", True),
    ("bias", "all"),
    ("rank_pattern", {"q_proj": 8}),
    ("modules_to_save", ["lm_head"]),
    ("r", 0),
    ("r", "3"),
    ("lora_alpha", None),
  ],
)
def test_settings_that_change_the_meaning_are_refused_by_name(saved, setting, value):
  file = saved / "adapter_config.json"
  file.write_text(json.dumps(json.loads(file.read_text()) | {setting: value}))
  with pytest.raises(ValueError, match=rf"config.json: .*{setting} .*{re.escape(repr(value))}"):
    load_adapter(saved, ARCH)


def test_damaged_adapters_are_refused_by_file_and_tensor(saved):
  file = saved / "adapter_model.safetensors"
  whole = load_file(file)
  name = "base_model.model.model.layers.0.mlp.up_proj.lora_B.weight"

  def refused(tensors, message):
    save_file(tensors, file)
    with pytest.raises(ValueError, match=f"adapter_model.safetensors: .*{message}"):
      load_adapter(saved, ARCH)

  refused({k: v for k, v in whole.items() if k != name}, f"missing: '{name}'")
  refused(whole | {"base_model.model.lm_head.lora_A.weight": np.ones(3)}, "no place: .*lm_head")
  refused(whole | {name: np.ones((3, 64))}, rf"{name}' has shape \[3, 64\]; expected \[64, 3\]")
  file.write_bytes(file.read_bytes()[:50])
  with pytest.raises(ValueError, match="of 50 bytes is damaged"):
    load_adapter(saved, ARCH)
  file.unlink()
  (saved / "adapter_model.bin").write_bytes(b"")
  with pytest.raises(FileNotFoundError, match="adapter_model.safetensors does not exist"):
    load_adapter(saved, ARCH)
