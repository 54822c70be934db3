"""Published models by name: their parameter counts, and config.json there and back."""

import json
import math

import jax
import pytest
from flax import nnx

from alignx_jax.models.decoder import Decoder
from alignx_jax.models.hugging_face import make_config, read_config
from alignx_jax.models.presets import PRESETS, Architecture, RopeScaling, get_architecture

# Numbers of parameters as the models' pages on the Hugging Face hub give them.
PUBLISHED = {
  "llama31_8b": 8_030_261_248,
  "llama31_70b": 70_553_706_496,
  "llama32_1b": 1_235_814_400,
  "llama32_3b": 3_212_749_824,
  "qwen25_05b": 494_032_768,
  "qwen25_7b": 7_615_616_512,
  "mistral_7b_v02": 7_241_732_096,
  "mistral_7b_v03": 7_248_023_552,
  "smollm2_135m": 134_515_008,
  "smollm2_360m": 361_821_120,
  "smollm2_17b": 1_711_376_384,
}


def test_every_published_model_is_counted():
  assert PRESETS.keys() == PUBLISHED.keys() | {"tiny", "tiny8", "simulated_base"}


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameter_count_is_the_published_one(name):
  model = nnx.eval_shape(lambda: Decoder(get_architecture(name), rngs=nnx.Rngs(0)))
  assert (
    sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(nnx.state(model))) == (PUBLISHED[name])
  )


@pytest.mark.parametrize("name", PRESETS)
def test_config_json_keeps_the_architecture(name, tmp_path):
  file = tmp_path / "config.json"
  file.write_text(json.dumps(make_config(PRESETS[name], "bfloat16")))
  assert read_config(file) == PRESETS[name]


def test_both_spellings_of_rotary_settings_are_read(tmp_path):
  arch = PRESETS["llama32_1b"]
  config = make_config(arch, "bfloat16")
  config["rope_parameters"] = config.pop("rope_scaling") | {"rope_theta": config.pop("rope_theta")}
  (tmp_path / "config.json").write_text(json.dumps(config))
  assert read_config(tmp_path / "config.json") == arch


@pytest.mark.parametrize("axis", ["vocab_size", "width", "heads", "feed_forward"])
def test_tiny8_divides_by_eight_devices(axis):
  arch = PRESETS["tiny8"]
  assert getattr(arch, axis) % 8 == 0 and arch.kv_heads % 4 == 0
  assert arch.attention_bias and arch.rope_scaling and not arch.tied


@pytest.mark.parametrize(
  ("change", "message"),
  [
    ({"model_type": "gpt2"}, "model_type 'gpt2'; supported are llama, mistral, qwen2"),
    ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
    ({"sliding_window": 4096}, "sliding-window"),
    ({"quantization_config": {"quant_method": "gptq"}}, "quantized"),
    ({"rope_scaling": {"rope_type": "yarn"}}, "rope_type 'yarn'"),
    ({"rope_scaling": {"rope_type": "llama3"}}, "no field 'factor'"),
    ({"rope_scaling": "llama3"}, "config.json: "),
    ({"rope_theta": "1e4x"}, "config.json: "),
    ({"rope_theta": float("nan")}, "rope_theta is nan; it must be a number above 0"),
    ({"hidden_size": None}, "config.json: "),
    ({"vocab_size": 2.5}, "vocab_size is 2.5; it must be a whole number above 0"),
    ({"num_hidden_layers": -1}, "layers is -1"),
    ({"num_attention_heads": 0}, "heads is 0"),
    ({"num_attention_heads": 3, "head_dim": 8}, "3 heads do not divide by 2"),
    ({"head_dim": 7}, "head_width is 7"),
    ({"tie_word_embeddings": "yes"}, "tied is 'yes'"),
  ],
)
def test_a_config_that_is_not_supported_is_refused_by_field(tmp_path, change, message):
  (tmp_path / "config.json").write_text(json.dumps(make_config(PRESETS["tiny"], "x") | change))
  with pytest.raises(ValueError, match=message) as raised:
    read_config(tmp_path / "config.json")
  assert str(tmp_path / "config.json") in str(raised.value)


def test_scaling_that_turns_its_frequencies_around_is_refused():
  with pytest.raises(ValueError, match="low_freq_factor 4 and high_freq_factor 4"):
    RopeScaling(8, 4, 4, 8192)


def test_sizes_are_whole_numbers():
  with pytest.raises(ValueError, match="layers is True"):
    Architecture(
      vocab_size=9, width=8, layers=True, heads=1, kv_heads=1, head_width=8, feed_forward=8
    )
