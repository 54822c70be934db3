"""Low-rank adapters in the layout of Hugging Face's PEFT, out and in.

A factor pair (A, B) changes a projection by alpha / rank · A B (Hu et al. 2022). We keep
A [layers, in, rank] and B [layers, rank, out]; PEFT keeps, for each layer, their transposes.
"""

import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
from safetensors.numpy import save_file

from alignx_jax.models.hugging_face import open_safetensors, read_json, write_json
from alignx_jax.models.presets import Architecture
from alignx_jax.models.tensors import LAYER, layer_tensor, stored_shape

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
# The projections that can have an adapter: our name to the module's.
MODULES = {
  name: place.tensor.removesuffix(".weight") for name, place in LAYER.items() if " " in place.axes
}
# Settings of PEFT that change what the factors mean, with the values that we support.
_PLAIN = {
  "peft_type": ("LORA",),
  "bias": ("none", None),
  "fan_in_fan_out": (False, None),
  "use_rslora": (False, None),
  "use_dora": (False, None),
  "modules_to_save": ([], None),
  "layers_to_transform": ([], None),
  "rank_pattern": ({}, None),
  "alpha_pattern": ({}, None),
  "lora_bias": (False, None),
  "alora_invocation_tokens": ([], None),
  "trainable_token_indices": ([], {}, None),
}

Factors = Mapping[str, tuple[np.ndarray, np.ndarray]]


class Adapter(NamedTuple):
  """What load_adapter returns.

  Attributes:
    factors: our parameter's name to (A [layers, in, rank], B [layers, rank, out]); axes of the
      parameter that are inputs, or outputs, are one.
    base: the model it was made for, as its author names it.
  """

  factors: dict[str, tuple[np.ndarray, np.ndarray]]
  rank: int
  alpha: float
  base: str | None


def factors_of(blocks) -> dict[str, tuple[np.ndarray, np.ndarray]]:
  """The factors that a decoder's blocks carry (models/lora.py), on the host."""
  return {
    name: tuple(np.asarray(getattr(blocks, f"{name}_lora_{factor}")[...]) for factor in "ab")
    for name in MODULES
    if hasattr(blocks, f"{name}_lora_a")
  }


def save_adapter(
  factors: Factors,
  arch: Architecture,
  directory: str | Path,
  *,
  rank: int,
  alpha: float,
  base: str,
) -> None:
  """Writes adapter_config.json and adapter_model.safetensors as PEFT reads them.

  Args:
    factors: our parameter's name to (A [layers, in, rank], B [layers, rank, out]).
    alpha: changes are scaled by alpha / rank.
    base: the model that the adapter belongs to: a directory, or a name on the hub.
  Raises:
    ValueError: a name is no projection, or factors have other shapes.
  """
  if not factors:
    raise ValueError("There are no factors to save; train with config.lora.rank above 0.")
  tensors = {}
  for name, (a, b) in factors.items():
    if name not in MODULES:
      raise ValueError(f"{name!r} is no projection; there are {', '.join(MODULES)}.")
    for factor, value, shape in zip("AB", (a, b), _shapes(name, arch, rank), strict=True):
      if value.shape != (arch.layers, *shape[::-1]):
        raise ValueError(
          f"Factor {factor} of {name!r} has shape {list(value.shape)}; expected "
          f"{[arch.layers, *shape[::-1]]}."
        )
      for layer in range(arch.layers):
        tensors[_tensor(layer, name, factor)] = np.ascontiguousarray(value[layer].T)
  config = {
    "peft_type": "LORA",
    "task_type": "CAUSAL_LM",
    "base_model_name_or_path": base,
    "r": rank,
    "lora_alpha": int(alpha) if alpha == int(alpha) else alpha,  # whole numbers, by PEFT's types
    "lora_dropout": 0.0,
    "target_modules": [MODULES[name].split(".")[-1] for name in factors],
    "bias": "none",
    "fan_in_fan_out": False,
    "use_rslora": False,
    "use_dora": False,
    "modules_to_save": None,
    "init_lora_weights": True,
    "inference_mode": True,
  }
  directory = Path(directory)
  directory.mkdir(parents=True, exist_ok=True)
  with tempfile.TemporaryDirectory(dir=directory, prefix=".saving-") as temporary:
    temporary = Path(temporary)
    write_json(temporary / CONFIG, config)
    save_file(tensors, temporary / WEIGHTS, metadata={"format": "pt"})
    shutil.copymode(temporary / CONFIG, temporary / WEIGHTS)  # else the owner's alone
    for name in (WEIGHTS, CONFIG):
      os.replace(temporary / name, directory / name)


def load_adapter(directory: str | Path, arch: Architecture) -> Adapter:
  """Reads what save_adapter or PEFT wrote for a model of this architecture.

  Raises:
    FileNotFoundError, ValueError: a file is missing or damaged; a setting is not supported; a
      tensor is missing, has no place, or has another shape: names it.
  """
  directory = Path(directory)
  config = read_json(directory / CONFIG)
  for setting, supported in _PLAIN.items():
    if (value := config.get(setting)) not in supported:
      raise ValueError(
        f"{directory / CONFIG}: {setting} is {value!r}; supported is {supported[0]!r}."
      )
  rank, alpha = config.get("r"), config.get("lora_alpha")
  if not isinstance(rank, int) or rank < 1 or not isinstance(alpha, int | float):
    raise ValueError(f"{directory / CONFIG}: r is {rank!r} and lora_alpha {alpha!r}; need numbers.")
  if not (directory / WEIGHTS).exists():
    raise FileNotFoundError(
      f"{directory / WEIGHTS} does not exist; of an adapter_model.bin, which is pickled, make one."
    )
  file = open_safetensors(directory / WEIGHTS)
  held = set(file.keys())
  # PEFT takes module names, or one regular expression, for what it adapts: the tensors say it.
  adapted = [name for name in MODULES if any(f".{MODULES[name]}.lora_" in key for key in held)]
  wanted = {
    _tensor(layer, name, factor): shape
    for name in adapted
    for factor, shape in zip("AB", _shapes(name, arch, rank), strict=True)
    for layer in range(arch.layers)
  }
  if missing := sorted(wanted.keys() - held):
    raise ValueError(f"{directory / WEIGHTS}: {len(missing)} tensors are missing: {missing[0]!r}.")
  if extra := sorted(held - wanted.keys()):
    raise ValueError(f"{directory / WEIGHTS}: {len(extra)} tensors have no place: {extra[0]!r}.")
  for key, shape in wanted.items():
    if tuple(file.get_slice(key).get_shape()) != shape:
      raise ValueError(
        f"{directory / WEIGHTS}: {key!r} has shape {file.get_slice(key).get_shape()}; expected "
        f"{list(shape)}."
      )

  def stacked(name, factor):
    return np.stack(
      [file.get_tensor(_tensor(layer, name, factor)).T for layer in range(arch.layers)]
    )

  factors = {name: (stacked(name, "A"), stacked(name, "B")) for name in adapted}
  return Adapter(factors, rank, alpha, config.get("base_model_name_or_path"))


def _shapes(name: str, arch: Architecture, rank: int) -> tuple[tuple[int, int], tuple[int, int]]:
  """Shapes of A and B as PEFT stores them: [rank, in] and [out, rank]."""
  size_out, size_in = stored_shape(LAYER[name], arch)
  return (rank, size_in), (size_out, rank)


def _tensor(layer: int, name: str, factor: str) -> str:
  return f"base_model.model.{layer_tensor(layer, MODULES[name])}.lora_{factor}.weight"
