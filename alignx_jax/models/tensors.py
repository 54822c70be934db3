"""The tensors of a published checkpoint: their names, and how they hold our parameters.

Names and shapes are Hugging Face's. A parameter's axes are the letters its name ends in; the
table says in which order a tensor stores them, letters that lie on one axis written together:
"HA D" is a matrix [H·A, D].
"""

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np

from alignx_jax.models.presets import Architecture


class Place(NamedTuple):
  """Where a parameter is stored: the tensor's name (in its layer) and its axes."""

  tensor: str
  axes: str


OUTER = {
  "embedding_VD": Place("model.embed_tokens.weight", "V D"),
  "final_norm_D": Place("model.norm.weight", "D"),
  "head_VD": Place("lm_head.weight", "V D"),
}
LAYER = {
  "attention_norm_D": Place("input_layernorm.weight", "D"),
  "q_DHA": Place("self_attn.q_proj.weight", "HA D"),
  "k_DKA": Place("self_attn.k_proj.weight", "KA D"),
  "v_DKA": Place("self_attn.v_proj.weight", "KA D"),
  "q_bias_HA": Place("self_attn.q_proj.bias", "HA"),
  "k_bias_KA": Place("self_attn.k_proj.bias", "KA"),
  "v_bias_KA": Place("self_attn.v_proj.bias", "KA"),
  "o_HAD": Place("self_attn.o_proj.weight", "D HA"),
  "mlp_norm_D": Place("post_attention_layernorm.weight", "D"),
  "gate_DF": Place("mlp.gate_proj.weight", "F D"),
  "up_DF": Place("mlp.up_proj.weight", "F D"),
  "down_FD": Place("mlp.down_proj.weight", "D F"),
}
# Types whose values are weights as they stand.
WEIGHT_TYPES = ("BF16", "F16", "F32", "F64")


class Stored(NamedTuple):
  """What a file says of a tensor: its shape, and its type as safetensors names it."""

  shape: tuple[int, ...]
  dtype: str


class Source(NamedTuple):
  """An opened checkpoint of which nothing has been read but names and shapes.

  Attributes:
    tensors: what there is, by Hugging Face's name.
    read: a block of a tensor, on the host, in the type it is stored in: its name and a slice
      for each of its axes.
  """

  arch: Architecture
  tensors: dict[str, Stored]
  read: Callable[[str, tuple[slice, ...]], np.ndarray]


def layer_tensor(layer: int, tensor: str) -> str:
  """The full name of a layer's tensor."""
  return f"model.layers.{layer}.{tensor}"


def axis_sizes(arch: Architecture) -> dict[str, int]:
  """Size of each axis letter but the layers'."""
  return {
    "V": arch.vocab_size,
    "D": arch.width,
    "H": arch.heads,
    "K": arch.kv_heads,
    "A": arch.head_width,
    "F": arch.feed_forward,
  }


def stored_shape(place: Place, arch: Architecture) -> tuple[int, ...]:
  """The shape of a parameter's tensor."""
  sizes = axis_sizes(arch)
  return tuple(math.prod(sizes[letter] for letter in axis) for axis in place.axes.split())


def expected_tensors(arch: Architecture) -> Iterator[tuple[str, tuple[int, ...]]]:
  """Name and shape of every tensor of a checkpoint, in the order they are written."""
  outer = {name: (place.tensor, stored_shape(place, arch)) for name, place in OUTER.items()}
  layer = {
    place.tensor: stored_shape(place, arch)
    for name, place in LAYER.items()
    if "bias" not in name or arch.attention_bias
  }
  yield outer["embedding_VD"]
  for i in range(arch.layers):
    for tensor, shape in layer.items():
      yield layer_tensor(i, tensor), shape
  yield outer["final_norm_D"]
  if not arch.tied:
    yield outer["head_VD"]


def check_tensors(source: Source, origin) -> None:
  """Compares what a source holds with what its architecture needs.

  Args:
    origin: the file or directory, for the message.
  Raises:
    ValueError: a tensor is missing, has no place, or is of another shape or a type that holds
      no weights; names the tensor, and both shapes.
  """
  held = source.tensors
  # Before anything is counted out: a damaged config may ask for billions.
  if source.arch.layers > len(held):
    raise ValueError(
      f"{origin} should have {source.arch.layers} layers and holds {len(held)} tensors in all; "
      "fetch it again."
    )
  wanted = dict(expected_tensors(source.arch))
  if missing := [name for name in wanted if name not in held]:
    raise ValueError(f"{origin}: {len(missing)} tensors are missing, the first is {missing[0]!r}.")
  # A tied model may carry its head all the same, and old ones their rotary frequencies.
  ignored = {name for name in held if name.endswith("rotary_emb.inv_freq")} | {"lm_head.weight"}
  if extra := sorted(held.keys() - wanted.keys() - ignored):
    raise ValueError(f"{origin}: {len(extra)} tensors have no place, the first is {extra[0]!r}.")
  for name, shape in wanted.items():
    if held[name].shape != shape:
      raise ValueError(
        f"{origin}: {name!r} has shape {list(held[name].shape)}; expected {list(shape)}."
      )
    if held[name].dtype not in WEIGHT_TYPES:
      raise ValueError(
        f"{origin}: {name!r} is of type {held[name].dtype}; supported are "
        f"{', '.join(WEIGHT_TYPES)}: convert the model."
      )


def read_block(source: Source, name: str, index: tuple[slice, ...], dtype) -> np.ndarray:
  """A block of one of our parameters, from no more of its tensors than the block needs.

  Args:
    name: the parameter's.
    index: a slice for each axis of the parameter, the layers' first if it has layers.
    dtype: to cast to, one tensor at a time.
  """
  sizes = axis_sizes(source.arch)
  if name in OUTER:
    place, layers, index = OUTER[name], None, index
  else:
    place, layers, index = LAYER[name], range(source.arch.layers)[index[0]], index[1:]
  letters = name.rsplit("_", 1)[1]
  ranges = {letter: range(sizes[letter])[part] for letter, part in zip(letters, index, strict=True)}
  order = place.axes.replace(" ", "")
  blocks, sub_index, sub_shape = [], [], []
  for axis in place.axes.split():
    # Of letters on one axis the first varies slowest, so its range is one run along the axis;
    # the others are cut from what was read.
    first, *rest = axis
    inner = math.prod(sizes[letter] for letter in rest)
    blocks.append(slice(ranges[first].start * inner, ranges[first].stop * inner))
    sub_shape += [len(ranges[first]), *(sizes[letter] for letter in rest)]
    sub_index += [slice(None), *(slice(ranges[x].start, ranges[x].stop) for x in rest)]

  def parameter(tensor):
    stored = source.read(tensor, tuple(blocks)).reshape(sub_shape)[tuple(sub_index)]
    return stored.transpose([order.index(letter) for letter in letters])

  shape = tuple(len(ranges[letter]) for letter in letters)
  out = np.empty(shape if layers is None else (len(layers), *shape), dtype)
  if layers is None:
    out[...] = parameter(place.tensor)
  else:
    for row, layer in zip(out, layers, strict=True):
      row[...] = parameter(layer_tensor(layer, place.tensor))
  return out


def as_stored(name: str, value: np.ndarray) -> np.ndarray:
  """A parameter, of one layer if it has layers, as its tensor stores it."""
  axes = (OUTER | LAYER)[name].axes
  letters = name.rsplit("_", 1)[1]
  sizes = dict(zip(letters, value.shape, strict=True))
  stored = value.transpose([letters.index(letter) for letter in axes.replace(" ", "")])
  shape = [math.prod(sizes[letter] for letter in axis) for axis in axes.split()]
  return np.ascontiguousarray(stored.reshape(shape))
