"""Weights of published models in, and ours out.

Reads Hugging Face directories and GGUF files straight into the shards of the decoder's
parameters; writes Hugging Face directories. How each keeps its tensors is told in
hugging_face.py and gguf_file.py, what they hold in tensors.py.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.experimental import multihost_utils

from alignx_jax.models import gguf_file, hugging_face
from alignx_jax.models.decoder import Decoder
from alignx_jax.models.presets import Architecture
from alignx_jax.models.tensors import (
  LAYER,
  OUTER,
  Source,
  as_stored,
  check_tensors,
  expected_tensors,
  layer_tensor,
  read_block,
)


def load_decoder(
  path: str | Path, *, shardings: Callable[[nnx.State], Any] | None = None, **options
) -> Decoder:
  """A Decoder with the weights of a Hugging Face directory or a GGUF file.

  Each device's part of a parameter is read for it alone, so a model that only fits on all devices
  together can be loaded; the host holds one parameter (all layers of it) at a time.

  Args:
    path: a directory with config.json and safetensors files, or a .gguf file.
    shardings: from the parameters' shapes, an nnx.State of jax.ShapeDtypeStruct, to a tree of
      the same structure of jax.sharding.NamedSharding; None puts all on the default device.
    options: param_dtype, compute_dtype and remat of Decoder.
  Raises:
    FileNotFoundError, ValueError: what is missing or does not fit, by file and tensor; told
      before any weight is read.
  """
  source = _open(Path(path))
  model = nnx.eval_shape(lambda: Decoder(source.arch, rngs=nnx.Rngs(0), **options))
  graph, abstract = nnx.split(model)
  leaves, structure = jax.tree_util.tree_flatten_with_path(abstract)
  targets = jax.tree.leaves(shardings(abstract)) if shardings else [None] * len(leaves)
  loaded = []
  for (path, leaf), sharding in zip(leaves, targets, strict=True):
    value = _place(source, _name(path), leaf, sharding)
    # The host's copy can go before the next is made.
    loaded.append(jax.block_until_ready(value))
  return nnx.merge(graph, jax.tree.unflatten(structure, loaded))


def read_architecture(path: str | Path) -> Architecture:
  """The architecture of a model that load_decoder takes; raises what it raises, reads no weight."""
  return _open(Path(path)).arch


def _open(path: Path) -> Source:
  """A checkpoint that has all it should."""
  opened = gguf_file.open_gguf if path.suffix == ".gguf" else hugging_face.open_directory
  source = opened(path)
  check_tensors(source, path)
  return source


def _name(path) -> str:
  """A parameter's own name from its path in the state, which ends in the variable's value."""
  return [key.key for key in path if isinstance(key, jax.tree_util.DictKey)][-1]


def _place(source: Source, name: str, leaf: jax.ShapeDtypeStruct, sharding) -> jax.Array:
  """A parameter on its devices."""
  whole = tuple(slice(0, size) for size in leaf.shape)
  if sharding is None:
    return jax.device_put(read_block(source, name, whole, leaf.dtype))
  blocks = {}  # devices that hold the same share one block

  def block(index):
    key = tuple(part.indices(size) for part, size in zip(index, leaf.shape, strict=True))
    if key not in blocks:
      blocks[key] = read_block(source, name, index, leaf.dtype)
    return blocks[key]

  return jax.make_array_from_callback(leaf.shape, sharding, block, dtype=leaf.dtype)


def save_decoder(model: Decoder, directory: str | Path, *, file_bytes: int = 5 * 2**30) -> None:
  """Writes a Hugging Face directory: config.json and safetensors, as transformers reads them.

  A layer's tensor is brought to the host at a time, and a file's tensors are held there until
  the file is written. Weights keep their type. Of several processes all must call this, and the
  first one writes.

  Args:
    directory: a model that was there is replaced, once all of the new one is written.
    file_bytes: the most that the tensors of one file take; a larger model gets several files
      and their index.
  Raises:
    ValueError: the model has parameters beside a decoder's, which would be lost.
  """
  names = [_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(nnx.state(model))]
  if lost := [name for name in names if name not in OUTER | LAYER]:
    raise ValueError(
      f"{lost[0]!r} has no place in a Hugging Face checkpoint; merge an adapter first, with "
      "models.lora.merge_lora."
    )
  parameters = {}
  for name, place in OUTER.items():
    if hasattr(model, name):
      parameters[place.tensor] = name, getattr(model, name)[...], None
  for name, place in LAYER.items():
    if hasattr(model.blocks, name):
      stacked = getattr(model.blocks, name)[...]
      for layer in range(model.arch.layers):
        parameters[layer_tensor(layer, place.tensor)] = name, stacked, layer

  def fetch(name, value, layer):
    return as_stored(name, _on_host(value if layer is None else value[layer]))

  tensors = []
  for tensor, shape in expected_tensors(model.arch):
    entry = parameters[tensor]
    nbytes = int(np.prod(shape)) * entry[1].dtype.itemsize
    tensors.append(hugging_face.ToWrite(tensor, nbytes, lambda entry=entry: fetch(*entry)))
  config = hugging_face.make_config(model.arch, str(model.embedding_VD[...].dtype))
  if jax.process_index() == 0:
    hugging_face.write_directory(Path(directory), config, tensors, file_bytes=file_bytes)
  else:  # every process has a hand in bringing each tensor together
    for tensor in tensors:
      tensor.fetch()
  if jax.process_count() > 1:
    multihost_utils.sync_global_devices("save_decoder")


def _on_host(value: jax.Array) -> np.ndarray:
  """All of an array, whichever processes hold its parts."""
  if value.is_fully_addressable:
    return np.asarray(value)
  return multihost_utils.process_allgather(value, tiled=True)
