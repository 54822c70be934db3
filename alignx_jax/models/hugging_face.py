"""Hugging Face model directories: config.json and safetensors files, in and out.

Weights lie in model.safetensors, or in several files that model.safetensors.index.json names.
Nothing is unpickled, and no name in the index leads out of the directory; links in it, of which
download caches are made, are followed.
"""

import contextlib
import dataclasses
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from alignx_jax.models.presets import Architecture, RopeScaling
from alignx_jax.models.tensors import Source, Stored

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
# model_type to class: what one decoder serves.
_FAMILIES = {
  "llama": "LlamaForCausalLM",
  "mistral": "MistralForCausalLM",
  "qwen2": "Qwen2ForCausalLM",
}


def open_directory(path: Path) -> Source:
  """Opens a model's directory without reading its weights.

  Raises:
    FileNotFoundError, ValueError: what is missing, damaged or not supported, by file.
  """
  arch = read_config(path / "config.json")
  if (path / SINGLE).exists():  # as transformers does, whatever else there is
    files = {SINGLE: open_safetensors(path / SINGLE)}
    place_of = dict.fromkeys(files[SINGLE].keys(), SINGLE)
  elif (path / INDEX).exists():
    files, place_of = _open_indexed(path)
  elif list(path.glob("*.bin")) or list(path.glob("*.pt*")):
    raise ValueError(
      f"{path} holds pickled weights only, which could run code when read; convert them to "
      "safetensors, or fetch the model's safetensors files."
    )
  else:
    raise FileNotFoundError(f"{path} has neither {SINGLE} nor {INDEX}: fetch the model's weights.")

  slices = {tensor: files[name].get_slice(tensor) for tensor, name in place_of.items()}
  tensors = {
    tensor: Stored(tuple(part.get_shape()), part.get_dtype()) for tensor, part in slices.items()
  }
  return Source(arch, tensors, lambda name, block: slices[name][block])


def _open_indexed(path: Path) -> tuple[dict, dict[str, str]]:
  """The files of a directory with an index, by name, and the name of each tensor's file."""
  place_of = _read_index(path / INDEX)
  names = sorted(set(place_of.values()))
  if missing := [name for name in names if not (path / name).exists()]:
    raise FileNotFoundError(
      f"{path} lacks {len(missing)} of the {len(names)} files that {INDEX} names, the first is "
      f"{missing[0]}; fetch it again."
    )
  files = {name: open_safetensors(path / name) for name in names}
  held = {name: set(file.keys()) for name, file in files.items()}
  for tensor, name in place_of.items():
    if tensor not in held[name]:
      raise ValueError(f"{path / name} does not hold {tensor!r}, as {INDEX} says; fetch both.")
  for name, tensors in held.items():
    if extra := sorted(tensor for tensor in tensors if place_of.get(tensor) != name):
      raise ValueError(f"{path / name} holds {extra[0]!r}, of which {INDEX} knows nothing.")
  return files, place_of


def open_safetensors(file: Path):
  """Opens a file, whose header safetensors checks: offsets, sizes, types, its own length.

  Raises:
    ValueError: it is not whole.
  """
  try:
    return safe_open(file, framework="numpy")
  except SafetensorError as error:
    size = file.stat().st_size
    raise ValueError(f"{file} of {size:,} bytes is damaged ({error}); fetch it again.") from error


def read_json(file: Path) -> dict:
  """A JSON object.

  Raises:
    FileNotFoundError, ValueError: there is no such file, or it holds something else.
  """
  if not file.exists():
    raise FileNotFoundError(f"{file} does not exist: fetch the whole directory again.")
  try:
    content = json.loads(file.read_text(encoding="utf-8"))
  except (ValueError, RecursionError) as error:
    raise ValueError(f"{file} is not whole JSON ({error}); fetch it again.") from error
  if not isinstance(content, dict):
    raise ValueError(f"{file} holds a {type(content).__name__}, not an object; fetch it again.")
  return content


def _read_index(file: Path) -> dict[str, str]:
  """From each tensor to the name of the file beside `file` that holds it."""
  place_of = read_json(file).get("weight_map")
  if not isinstance(place_of, dict) or not place_of:
    raise ValueError(f"{file} has no 'weight_map' from tensors to files; fetch it again.")
  for tensor, name in place_of.items():
    # A plain file name: neither a path nor "..", so that nothing elsewhere can be opened.
    plain = isinstance(name, str) and not set(name) & set("/\\:\0")
    if not plain or not name.endswith(".safetensors"):
      raise ValueError(f"{file}: {tensor!r} is in {name!r}, which names no safetensors file here.")
  return place_of


def read_config(file: Path) -> Architecture:
  """The architecture that a config.json describes.

  Rotary settings come as `rope_parameters` (transformers 5) or as `rope_theta` and
  `rope_scaling` (most of what is published).

  Raises:
    FileNotFoundError, ValueError: there is none, or what it has and we do not support.
  """
  config = read_json(file)
  family = config.get("model_type")
  if family not in _FAMILIES:
    raise ValueError(f"{file}: model_type {family!r}; supported are {', '.join(_FAMILIES)}.")
  if config.get("hidden_act", "silu") != "silu":
    raise ValueError(f"{file}: hidden_act {config['hidden_act']!r}; only 'silu' is supported.")
  if config.get("use_sliding_window", family != "qwen2") and config.get("sliding_window"):
    raise ValueError(f"{file}: sliding-window attention is not supported.")
  if config.get("quantization_config"):
    raise ValueError(f"{file}: quantized weights are not supported; fetch the model in bfloat16.")
  try:
    return _parse(config, family)
  except KeyError as error:
    raise ValueError(f"{file} has no field {error}; fetch it again or add it.") from error
  except (TypeError, ValueError) as error:
    raise ValueError(f"{file}: {error}") from error


def _parse(config: dict, family: str) -> Architecture:
  rope = {
    "rope_theta": config.get("rope_theta", 10_000.0),
    **(config.get("rope_scaling") or {}),
    **(config.get("rope_parameters") or {}),
  }
  kind = rope.get("rope_type", rope.get("type", "default"))
  if kind not in ("default", "llama3"):
    raise ValueError(f"rope_type {kind!r}; supported are 'default' and 'llama3'.")
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
    head_width=config.get("head_dim") or config["hidden_size"] // max(heads, 1),
    feed_forward=config["intermediate_size"],
    rope_theta=float(rope["rope_theta"]),
    rope_scaling=scaling,
    norm_epsilon=config.get("rms_norm_eps", 1e-6),
    tied=config.get("tie_word_embeddings", False),
    attention_bias=config.get("attention_bias", family == "qwen2"),
    max_positions=config.get("max_position_embeddings", 2048),
  )


def make_config(arch: Architecture, dtype: str) -> dict:
  """The config.json of an architecture; `read_config` is its inverse.

  A Mistral is written as a Llama: without a sliding window the two are the same function, and
  the same tensors. Only Qwen2's class has biases on q, k and v and none on o.

  Args:
    dtype: of the weights, such as "bfloat16".
  """
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


class ToWrite(NamedTuple):
  """A tensor that is still elsewhere: `fetch` brings it to the host."""

  name: str
  bytes: int
  fetch: Callable[[], np.ndarray]


def write_directory(
  directory: Path, config: dict, tensors: Sequence[ToWrite], *, file_bytes: int
) -> None:
  """Writes config.json and the weights, in several files and an index if one would be too large.

  All files are written under `directory` first and moved to their places then, what makes the
  directory a model last: a run that is killed leaves no model, or a whole one. At most one file's
  tensors are on the host at a time.

  Args:
    file_bytes: the most that a file's tensors may take, unless a single one takes more.
  """
  directory.mkdir(parents=True, exist_ok=True)
  parts = _split(tensors, file_bytes)
  names = [f"model-{i:05}-of-{len(parts):05}.safetensors" for i in range(1, len(parts) + 1)]
  with tempfile.TemporaryDirectory(dir=directory, prefix=".saving-") as temporary:
    temporary = Path(temporary)
    if len(parts) == 1:
      marker, names = SINGLE, [SINGLE]
    else:
      marker = INDEX
      place_of = {t.name: name for name, part in zip(names, parts, strict=True) for t in part}
      index = {"metadata": {"total_size": sum(t.bytes for t in tensors)}, "weight_map": place_of}
      write_json(temporary / INDEX, index)
    write_json(temporary / "config.json", config)
    for name, part in zip(names, parts, strict=True):
      save_file({t.name: t.fetch() for t in part}, temporary / name, metadata={"format": "pt"})
      # safetensors lets the owner alone read its files; others may read what they may elsewhere.
      shutil.copymode(temporary / "config.json", temporary / name)

    # Of a model that was here before, its marker goes first: old and new never mix.
    for old in (INDEX, SINGLE):
      with contextlib.suppress(FileNotFoundError):
        (directory / old).unlink()
    for old in directory.glob("model-*-of-*.safetensors"):
      old.unlink()
    for name in [*(n for n in names if n != marker), "config.json", marker]:
      os.replace(temporary / name, directory / name)


def _split(tensors: Sequence[ToWrite], file_bytes: int) -> list[list[ToWrite]]:
  """Tensors in order, in runs of at most so many bytes."""
  parts, room = [], 0
  for tensor in tensors:
    if not parts or tensor.bytes > room:
      parts.append([])
      room = file_bytes
    parts[-1].append(tensor)
    room -= tensor.bytes
  return parts


def write_json(file: Path, content: dict) -> None:
  """Writes JSON as Hugging Face does, two spaces deep."""
  file.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
