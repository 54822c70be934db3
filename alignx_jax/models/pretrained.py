"""Weights of published models: Hugging Face directories in and out, GGUF in.

Tensors are named and shaped as Hugging Face does and laid out as the decoder's stacked
parameters. Nothing is unpickled: safetensors and GGUF hold plain arrays.
"""

import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from flax import nnx
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from alignx_jax.models.decoder import Decoder
from alignx_jax.models.presets import Architecture, RopeScaling

# The decoder's parameter to (Hugging Face tensor, axes). "in>out" is a projection, stored
# transposed as [out, in]; without ">" the axes are stored as they are.
_OUTER = {
  "embedding_VD": ("model.embed_tokens.weight", "VD"),
  "final_norm_D": ("model.norm.weight", "D"),
  "head_VD": ("lm_head.weight", "VD"),
}
_LAYER = {
  "attention_norm_D": ("input_layernorm.weight", "D"),
  "q_DHA": ("self_attn.q_proj.weight", "D>HA"),
  "k_DKA": ("self_attn.k_proj.weight", "D>KA"),
  "v_DKA": ("self_attn.v_proj.weight", "D>KA"),
  "q_bias_HA": ("self_attn.q_proj.bias", "HA"),
  "k_bias_KA": ("self_attn.k_proj.bias", "KA"),
  "v_bias_KA": ("self_attn.v_proj.bias", "KA"),
  "o_HAD": ("self_attn.o_proj.weight", "HA>D"),
  "mlp_norm_D": ("post_attention_layernorm.weight", "D"),
  "gate_DF": ("mlp.gate_proj.weight", "D>F"),
  "up_DF": ("mlp.up_proj.weight", "D>F"),
  "down_FD": ("mlp.down_proj.weight", "F>D"),
}
_GGUF_NAMES = {
  "model.embed_tokens": "token_embd",
  "model.norm": "output_norm",
  "lm_head": "output",
  "input_layernorm": "attn_norm",
  "self_attn.q_proj": "attn_q",
  "self_attn.k_proj": "attn_k",
  "self_attn.v_proj": "attn_v",
  "self_attn.o_proj": "attn_output",
  "post_attention_layernorm": "ffn_norm",
  "mlp.gate_proj": "ffn_gate",
  "mlp.up_proj": "ffn_up",
  "mlp.down_proj": "ffn_down",
}
_FAMILIES = {
  "llama": "LlamaForCausalLM",
  "mistral": "MistralForCausalLM",
  "qwen2": "Qwen2ForCausalLM",
}

ReadTensor = Callable[[str], np.ndarray]


def load_decoder(path: str | Path, **options) -> Decoder:
  """A Decoder with the weights of a Hugging Face directory or a GGUF file.

  Args:
    path: a directory with config.json and model.safetensors, or a .gguf file.
    options: param_dtype, compute_dtype and remat of Decoder.
  Raises:
    FileNotFoundError, ValueError: what is missing or does not fit, by file and tensor.
  """
  path = Path(path)
  arch, read, names = (_open_gguf if path.suffix == ".gguf" else _open_hugging_face)(path)
  wanted = set(tensor_names(arch))
  if missing := sorted(wanted - names):
    raise ValueError(f"{path}: {len(missing)} tensors are missing, the first is {missing[0]!r}.")
  # A tied model may carry its head all the same, and old ones their rotary frequencies.
  ignored = {name for name in names if name.endswith("rotary_emb.inv_freq")} | {"lm_head.weight"}
  if extra := sorted(names - wanted - ignored):
    raise ValueError(f"{path}: {len(extra)} tensors have no place, the first is {extra[0]!r}.")
  sizes = _sizes(arch)

  def tensor(name: str, axes: str) -> np.ndarray:
    inputs, _, outputs = axes.rpartition(">")
    shape = [[sizes[a] for a in group] for group in (inputs, outputs)]
    stored = [math.prod(shape[1]), math.prod(shape[0])] if inputs else shape[1]
    value = read(name)
    if list(value.shape) not in (stored, [math.prod(stored)]):
      raise ValueError(f"{path}: {name!r} has shape {list(value.shape)}; expected {stored}.")
    return (value.T if inputs else value).reshape(shape[0] + shape[1])

  model = nnx.eval_shape(lambda: Decoder(arch, rngs=nnx.Rngs(0), **options))
  for name, (stored_name, axes) in _present(_OUTER, model):
    _assign(model, name, tensor(stored_name, axes))
  for name, (stored_name, axes) in _present(_LAYER, model.blocks):
    layers = [tensor(f"model.layers.{i}.{stored_name}", axes) for i in range(arch.layers)]
    _assign(model.blocks, name, np.stack(layers))
  return model


def save_decoder(model: Decoder, directory: str | Path) -> None:
  """Writes config.json and model.safetensors as transformers reads them."""
  directory = Path(directory)
  directory.mkdir(parents=True, exist_ok=True)
  tensors = {}

  def put(name, value, axes):
    inputs = axes.rpartition(">")[0]
    if inputs:
      value = value.reshape(math.prod(value.shape[: len(inputs)]), -1).T
    elif len(axes) == 2 and axes != "VD":
      value = value.reshape(-1)
    tensors[name] = np.ascontiguousarray(value)

  for name, (stored_name, axes) in _present(_OUTER, model):
    put(stored_name, np.asarray(getattr(model, name)[...]), axes)
  for name, (stored_name, axes) in _present(_LAYER, model.blocks):
    for i, value in enumerate(np.asarray(getattr(model.blocks, name)[...])):
      put(f"model.layers.{i}.{stored_name}", value, axes)
  save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
  config = _hugging_face_config(model.arch, str(model.embedding_VD[...].dtype))
  (directory / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def tensor_names(arch: Architecture) -> list[str]:
  """Every tensor name of a Hugging Face checkpoint of this architecture."""
  outer = [name for key, (name, _) in _OUTER.items() if key != "head_VD" or not arch.tied]
  layer = [name for key, (name, _) in _LAYER.items() if "bias" not in key or arch.attention_bias]
  return outer + [f"model.layers.{i}.{name}" for i in range(arch.layers) for name in layer]


def _present(table, module):
  return [(name, entry) for name, entry in table.items() if hasattr(module, name)]


def _assign(module, name, value):
  param = getattr(module, name)
  setattr(module, name, nnx.Param(jnp.asarray(value, param.dtype)))


def _sizes(arch: Architecture) -> dict[str, int]:
  return {
    "V": arch.vocab_size,
    "D": arch.width,
    "H": arch.heads,
    "K": arch.kv_heads,
    "A": arch.head_width,
    "F": arch.feed_forward,
  }


def _open_hugging_face(path: Path) -> tuple[Architecture, ReadTensor, set[str]]:
  config_file, weights_file = path / "config.json", path / "model.safetensors"
  if (path / "model.safetensors.index.json").exists():
    raise ValueError(f"{path} holds weights in several files; only model.safetensors is read yet.")
  for file in (config_file, weights_file):
    if not file.exists():
      raise FileNotFoundError(f"{file} does not exist; {path} is no Hugging Face model directory.")
  try:
    arch = _parse_config(json.loads(config_file.read_text(encoding="utf-8")), config_file)
  except json.JSONDecodeError as error:
    raise ValueError(f"{config_file} is not whole JSON ({error}); fetch it again.") from error
  except KeyError as error:
    raise ValueError(f"{config_file} has no field {error}; fetch it again or add it.") from error
  try:
    # numpy has no bfloat16: "flax" gives JAX arrays, which have.
    weights = safe_open(weights_file, framework="flax")
  except SafetensorError as error:
    raise ValueError(f"{weights_file} is damaged ({error}); fetch it again.") from error
  return arch, lambda name: np.asarray(weights.get_tensor(name)), set(weights.keys())


def _parse_config(config: dict, file: Path) -> Architecture:
  """Reads config.json, with rope as `rope_parameters` (new) or `rope_theta` (published)."""
  family = config.get("model_type")
  if family not in _FAMILIES:
    raise ValueError(f"{file}: model_type {family!r}; supported are {', '.join(_FAMILIES)}.")
  if config.get("hidden_act", "silu") != "silu":
    raise ValueError(f"{file}: hidden_act {config['hidden_act']!r}; only 'silu' is supported.")
  if config.get("use_sliding_window", True) and config.get("sliding_window"):
    raise ValueError(f"{file}: sliding-window attention is not supported.")
  rope = {
    "rope_theta": config.get("rope_theta", 10_000.0),
    **(config.get("rope_scaling") or {}),
    **(config.get("rope_parameters") or {}),
  }
  kind = rope.get("rope_type", rope.get("type", "default"))
  if kind not in ("default", "llama3"):
    raise ValueError(f"{file}: rope_type {kind!r}; supported are 'default' and 'llama3'.")
  scaling = None
  if kind == "llama3":
    scaling = RopeScaling(
      rope["factor"],
      rope["low_freq_factor"],
      rope["high_freq_factor"],
      rope["original_max_position_embeddings"],
    )
  heads = config["num_attention_heads"]
  return Architecture(
    vocab_size=config["vocab_size"],
    width=config["hidden_size"],
    layers=config["num_hidden_layers"],
    heads=heads,
    kv_heads=config.get("num_key_value_heads") or heads,
    head_width=config.get("head_dim") or config["hidden_size"] // heads,
    feed_forward=config["intermediate_size"],
    rope_theta=float(rope["rope_theta"]),
    rope_scaling=scaling,
    norm_epsilon=config.get("rms_norm_eps", 1e-6),
    tied=config.get("tie_word_embeddings", False),
    attention_bias=config.get("attention_bias", family == "qwen2"),
    max_positions=config.get("max_position_embeddings", 2048),
  )


def _hugging_face_config(arch: Architecture, dtype: str) -> dict:
  family = "qwen2" if arch.attention_bias else "llama"
  config = {
    "architectures": [_FAMILIES[family]],
    "model_type": family,
    "torch_dtype": dtype,
    "vocab_size": arch.vocab_size,
    "hidden_size": arch.width,
    "intermediate_size": arch.feed_forward,
    "num_hidden_layers": arch.layers,
    "num_attention_heads": arch.heads,
    "num_key_value_heads": arch.kv_heads,
    "head_dim": arch.head_width,
    "hidden_act": "silu",
    "rms_norm_eps": arch.norm_epsilon,
    "rope_theta": arch.rope_theta,
    "max_position_embeddings": arch.max_positions,
    "tie_word_embeddings": arch.tied,
  }
  if arch.rope_scaling is not None:
    scaling = dataclasses.asdict(arch.rope_scaling)
    scaling["original_max_position_embeddings"] = scaling.pop("original_max_positions")
    config["rope_scaling"] = {"rope_type": "llama3", **scaling}
  return config


def _open_gguf(path: Path) -> tuple[Architecture, ReadTensor, set[str]]:
  """Opens a GGUF file of the Llama architecture, under Hugging Face's tensor names."""
  try:
    import gguf
  except ImportError as error:
    raise ImportError(f"{path} needs the gguf reader; pip install 'alignx_jax[gguf]'") from error
  if not path.exists():
    raise FileNotFoundError(f"{path} does not exist; set config.model.weights to a model.")
  try:
    reader = gguf.GGUFReader(path)
  except (ValueError, IndexError) as error:
    raise ValueError(f"{path} is no whole GGUF file ({error}); fetch it again.") from error

  def field(key, default=None):
    entry = reader.get_field(key)
    return default if entry is None else entry.contents()

  family = field("general.architecture")
  if family != "llama":
    raise ValueError(f"{path}: architecture {family!r}; only 'llama' GGUF files are supported.")
  tensors = {_hugging_face_name(tensor.name): tensor for tensor in reader.tensors}
  # The factors of Llama 3.1's rope scaling come as a tensor that we would ignore.
  scaling = field("llama.rope.scaling.type", "none")
  if scaling != "none" or any("rope_freqs" in tensor.name for tensor in reader.tensors):
    raise ValueError(f"{path}: GGUF with scaled rotary frequencies is not supported.")
  heads, width = field("llama.attention.head_count"), field("llama.embedding_length")
  if field("llama.attention.layer_norm_rms_epsilon") is None:
    raise ValueError(f"{path} has no 'llama.attention.layer_norm_rms_epsilon'; fetch it again.")
  arch = Architecture(
    vocab_size=int(tensors["model.embed_tokens.weight"].shape[1]),
    width=width,
    layers=field("llama.block_count"),
    heads=heads,
    kv_heads=field("llama.attention.head_count_kv", heads),
    head_width=field("llama.attention.key_length", width // heads),
    feed_forward=field("llama.feed_forward_length"),
    rope_theta=float(field("llama.rope.freq_base", 10_000.0)),
    # Stored as float32: read back the decimal that was meant, 1e-05.
    norm_epsilon=float(str(np.float32(field("llama.attention.layer_norm_rms_epsilon")))),
    tied="lm_head.weight" not in tensors,
    max_positions=field("llama.context_length"),
  )

  def read(name):
    tensor = tensors[name]
    value = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
    if "q_proj" in name or "k_proj" in name:
      # GGUF interleaves the two rotary halves of each head; put them side by side again.
      count = arch.heads if "q_proj" in name else arch.kv_heads
      value = value.reshape(count, arch.head_width // 2, 2, -1).swapaxes(1, 2)
      value = value.reshape(count * arch.head_width, -1)
    return value

  return arch, read, set(tensors)


def _hugging_face_name(gguf_name: str) -> str:
  stem, _, suffix = gguf_name.rpartition(".")
  prefix = ""
  if stem.startswith("blk."):
    _, layer, stem = stem.split(".", 2)
    prefix = f"model.layers.{layer}."
  names = {ours: theirs for theirs, ours in _GGUF_NAMES.items()}
  return f"{prefix}{names.get(stem, stem)}.{suffix}"
