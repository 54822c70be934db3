"""GGUF files of the Llama architecture, as llama.cpp writes them: in only.

Weights are dequantised as they are read, a tensor at a time.
"""

import functools
from pathlib import Path

import numpy as np

from alignx_jax.models.presets import Architecture
from alignx_jax.models.tensors import Source, Stored

# Parts of GGUF's names to Hugging Face's.
_NAMES = {
  "token_embd": "model.embed_tokens",
  "output_norm": "model.norm",
  "output": "lm_head",
  "attn_norm": "input_layernorm",
  "attn_q": "self_attn.q_proj",
  "attn_k": "self_attn.k_proj",
  "attn_v": "self_attn.v_proj",
  "attn_output": "self_attn.o_proj",
  "ffn_norm": "post_attention_layernorm",
  "ffn_gate": "mlp.gate_proj",
  "ffn_up": "mlp.up_proj",
  "ffn_down": "mlp.down_proj",
}


def open_reader(path: Path):
  """The `gguf` package's reader of a file.

  Raises:
    FileNotFoundError, ImportError, ValueError: what is missing, to install, or damaged.
  """
  try:
    import gguf
  except ImportError as error:
    raise ImportError(f"{path} needs the gguf reader; pip install 'alignx_jax[gguf]'") from error
  if not path.exists():
    raise FileNotFoundError(f"{path} does not exist; set config.model.weights to a model.")
  try:
    return gguf.GGUFReader(path)
  except Exception as error:  # a damaged file raises whatever numpy meets first
    size = path.stat().st_size
    raise ValueError(
      f"{path} of {size:,} bytes is no whole GGUF file ({error}); fetch it again."
    ) from error


def open_gguf(path: Path) -> Source:
  """Opens a file under Hugging Face's tensor names, without reading its weights.

  Raises:
    FileNotFoundError, ImportError, ValueError: what is missing, damaged or not supported.
  """
  reader = open_reader(path)
  from gguf import quants

  held = {_hugging_face_name(tensor.name): tensor for tensor in reader.tensors}
  # GGUF lists sizes from the last axis to the first; what we read is always float32.
  tensors = {
    name: Stored(tuple(int(size) for size in tensor.shape[::-1]), "F32")
    for name, tensor in held.items()
  }
  try:
    arch = _architecture(reader, tensors)
  except (TypeError, ValueError) as error:
    raise ValueError(f"{path}: {error}") from error

  # A parameter is read device by device, of each all layers: keep those till the next one's.
  @functools.lru_cache(maxsize=arch.layers)
  def dequantized(name):
    tensor = held[name]
    try:
      value = quants.dequantize(tensor.data, tensor.tensor_type)
    except NotImplementedError as error:
      raise ValueError(f"{path}: {name!r} is of type {tensor.tensor_type.name}: {error}") from error
    heads = {"q_proj": arch.heads, "k_proj": arch.kv_heads}.get(name.split(".")[-2])
    return value if heads is None else _side_by_side(value, heads, arch.head_width)

  return Source(arch, tensors, lambda name, block: dequantized(name)[block])


def chat_template(path: Path) -> str | None:
  """The chat template that a file carries, if it does; raises as open_reader does."""
  entry = open_reader(path).get_field("tokenizer.chat_template")
  return None if entry is None else entry.contents()


def _architecture(reader, tensors: dict[str, Stored]) -> Architecture:
  def field(key, *default):
    entry = reader.get_field(key)
    if entry is None and not default:
      raise ValueError(f"there is no {key!r}; fetch it again.")
    return default[0] if entry is None else entry.contents()

  family = field("general.architecture", None)
  if family != "llama":
    raise ValueError(f"architecture {family!r}; only 'llama' GGUF files are supported.")
  # The factors of Llama 3.1's rope scaling come as a tensor that we would ignore.
  scaling = field("llama.rope.scaling.type", "none")
  if scaling != "none" or any("rope_freqs" in name for name in tensors):
    raise ValueError("GGUF with scaled rotary frequencies is not supported.")
  heads, width = field("llama.attention.head_count"), field("llama.embedding_length")
  embedding = "model.embed_tokens.weight"
  return Architecture(
    # Of a file without its embedding, check_tensors says so.
    vocab_size=tensors[embedding].shape[0] if embedding in tensors else 1,
    width=width,
    layers=field("llama.block_count"),
    heads=heads,
    kv_heads=field("llama.attention.head_count_kv", heads),
    head_width=field("llama.attention.key_length", width // max(heads, 1)),
    feed_forward=field("llama.feed_forward_length"),
    rope_theta=float(field("llama.rope.freq_base", 10_000.0)),
    # Stored as float32: read back the decimal that was meant, 1e-05.
    norm_epsilon=float(str(np.float32(field("llama.attention.layer_norm_rms_epsilon")))),
    tied="lm_head.weight" not in tensors,
    max_positions=field("llama.context_length"),
  )


def _side_by_side(value: np.ndarray, heads: int, head_width: int) -> np.ndarray:
  """Rows of q or k with the two rotary halves of each head apart, which GGUF interleaves."""
  value = value.reshape(heads, head_width // 2, 2, -1).swapaxes(1, 2)
  return value.reshape(heads * head_width, -1)


def _hugging_face_name(gguf_name: str) -> str:
  stem, _, suffix = gguf_name.rpartition(".")
  prefix = ""
  if stem.startswith("blk.") and stem.count(".") >= 2:
    _, layer, stem = stem.split(".", 2)
    prefix = f"model.layers.{layer}."
  return f"{prefix}{_NAMES.get(stem, stem)}.{suffix}"
