"""Weights in and out: GGUF as llama.cpp writes it, Hugging Face directories both ways."""

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

from alignx_jax.data.tokenizers import load_tokenizer
from alignx_jax.models.decoder import Decoder
from alignx_jax.models.presets import PRESETS
from alignx_jax.models.pretrained import load_decoder, save_decoder
from alignx_jax.objectives.log_probs import token_log_probs


def _write_gguf(path, directory, arch):
  """A Hugging Face Llama as llama.cpp's converter writes it, written from its description."""
  names = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
  }
  parts = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
  }
  writer = gguf.GGUFWriter(path, "llama")
  writer.add_context_length(arch.max_positions)
  writer.add_embedding_length(arch.width)
  writer.add_block_count(arch.layers)
  writer.add_feed_forward_length(arch.feed_forward)
  writer.add_head_count(arch.heads)
  writer.add_head_count_kv(arch.kv_heads)
  writer.add_rope_freq_base(arch.rope_theta)
  writer.add_layer_norm_rms_eps(arch.norm_epsilon)
  for name, value in load_file(directory / "model.safetensors").items():
    if name.startswith("model.layers."):
      _, _, layer, part = name.split(".", 3)
      stored = f"blk.{layer}.{parts[part.removesuffix('.weight')]}.weight"
    else:
      stored = names[name]
    count = {"q_proj": arch.heads, "k_proj": arch.kv_heads}.get(name.split(".")[-2])
    if count:
      # Pairs (i, i + A/2) of each head become neighbours.
      half = value.shape[0] // count // 2
      order = np.arange(count * 2 * half).reshape(count, 2, half).swapaxes(1, 2).reshape(-1)
      value = value[order]
    writer.add_tensor(stored, np.ascontiguousarray(value))
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.write_tensors_to_file()
  writer.close()
  return path


def test_gguf_gives_the_logits_of_the_model_it_was_made_from(goldens, tmp_path):
  directory = goldens / "hf_goldens" / "smollm2"
  arch = load_decoder(directory).arch
  model = load_decoder(_write_gguf(tmp_path / "model.gguf", directory, arch))
  assert model.arch == arch
  expected = np.load(directory / "golden.npz")
  tokens = np.concatenate([expected["context"], expected["chosen"]])[None]
  hidden = model(tokens, np.arange(tokens.shape[1])[None], np.ones_like(tokens))
  np.testing.assert_allclose(
    (hidden @ model.head.T)[0], expected["logits_context_chosen"], atol=1e-4
  )


def test_smollm2_reads_english(smollm2_path):
  model, tokenizer = load_decoder(smollm2_path), load_tokenizer(smollm2_path)
  assert model.arch == PRESETS["smollm2_135m"]

  @jax.jit
  def mean_log_prob(params, tokens):
    model_ = nnx.merge(nnx.graphdef(model), params)
    positions = np.arange(tokens.shape[1])[None]
    hidden = model_(tokens, positions, jnp.ones_like(tokens))
    return token_log_probs(hidden[:, :-1], model_.head, tokens[:, 1:]).mean()

  text = (
    "The capital of France is Paris. The capital of Italy is Rome, and that of Spain is Madrid."
  )
  tokens = np.asarray([tokenizer.encode(text)])
  shuffled = np.random.default_rng(0).permutation(tokens[0])[None]
  params = nnx.state(model)
  # Under 2 nats a token: with q and k left interleaved it is far above.
  assert mean_log_prob(params, tokens) > -2.0
  assert mean_log_prob(params, shuffled) < -4.0


@pytest.mark.parametrize("name", ["llama31", "smollm2", "qwen25", "mistral"])
def test_saved_weights_are_those_that_were_loaded(goldens, tmp_path, name):
  directory = goldens / "hf_goldens" / name
  save_decoder(load_decoder(directory), tmp_path)
  ours = load_file(tmp_path / "model.safetensors")
  theirs = load_file(directory / "model.safetensors")
  assert ours.keys() == theirs.keys()
  for key, value in theirs.items():
    np.testing.assert_array_equal(ours[key], value)
  assert load_decoder(tmp_path).arch == load_decoder(directory).arch


def test_missing_foreign_and_misshapen_tensors_are_named(tmp_path):
  save_decoder(Decoder(PRESETS["tiny"], rngs=nnx.Rngs(0)), tmp_path)
  file = tmp_path / "model.safetensors"
  whole = load_file(file)

  def broken(**changes):
    save_file({k: v for k, v in (whole | changes).items() if v is not None}, file)
    return pytest.raises(ValueError, match=next(iter(changes)).replace(".", r"\."))

  with broken(**{"model.norm.weight": None}):
    load_decoder(tmp_path)
  with broken(**{"model.layers.0.extra.weight": np.ones(3, np.float32)}):
    load_decoder(tmp_path)
  with broken(**{"model.layers.1.mlp.up_proj.weight": np.ones((3, 3), np.float32)}):
    load_decoder(tmp_path)
  file.write_bytes(file.read_bytes()[:100])
  with pytest.raises(ValueError, match="damaged"):
    load_decoder(tmp_path)
