"""Answers by a decoder: batched, cached, on any mesh; each as if it were alone.

A prompt is laid out as in training, with its last token at the front of the response:

  [ bridge tokens, P | shared prefix | rest of the prompt | response ]

Prompts of one group (a persona, asked many posts) share a prefix, which is read once and copied.
Sizes are out of a few (kv_cache.bucket), and every row has its own sampling settings, seed and
limit as data, so that few programs are compiled. A response depends on its prompt, settings and
seed alone; beside other rows the same numbers may be summed in another order.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from alignx_jax.inference.kv_cache import Cache, Reader, Weights, bucket
from alignx_jax.inference.programs import Decoding, decode_program, prefix_program, start_program
from alignx_jax.inference.prompts import (
  Generated,
  Prompt,
  common_prefixes,
  group_of,
  input_arrays,
  padded,
  plan_batches,
)
from alignx_jax.models.decoder import Decoder
from alignx_jax.training import mesh as meshes


class Started(NamedTuple):
  """Prompts that were read up to their last tokens.

  Attributes:
    slot: the first of the response.
    position_B: of the last tokens, which the response begins with.
  """

  cache: Cache
  slot: int
  input_B: np.ndarray
  position_B: np.ndarray


@dataclasses.dataclass(frozen=True, eq=False)
class Generator:
  """A decoder made ready to answer.

  Attributes:
    reader: the decoder's shape on its mesh.
    weights: its parameters.
    stop_ids: tokens that end a response.
    vocab: ids from here on are never drawn.
    bridge_token_PKD: the bridge's tokens; None without one.
    rows: the most rows of a batch.
  """

  reader: Reader
  weights: Weights = dataclasses.field(repr=False)
  stop_ids: tuple[int, ...]
  vocab: int
  bridge_token_PKD: jax.Array | None = dataclasses.field(default=None, repr=False)
  rows: int = 8
  _kept: dict = dataclasses.field(default_factory=dict, repr=False)

  @classmethod
  def of(
    cls,
    model: Decoder,
    params: nnx.State,
    mesh: Mesh,
    *,
    stop_ids: Sequence[int],
    vocab: int | None = None,
    rows: int = 8,
  ) -> "Generator":
    """Of a model, shapes alone or not, with these parameters on a mesh; weights are copied.

    Raises:
      ValueError: the mesh or the vocabulary does not go with the model, or rows is below 1.
    """
    vocab = model.arch.vocab_size if vocab is None else vocab
    if not max(stop_ids, default=0) < vocab <= model.arch.vocab_size:
      raise ValueError(
        f"The tokenizer has {vocab} ids and ends responses with {list(stop_ids)}; the model embeds "
        f"{model.arch.vocab_size}: set config.model.tokenizer to the model's own."
      )
    if rows < 1:
      raise ValueError(f"rows is {rows}; give 1 or more.")
    reader = Reader.of(model, mesh)
    with jax.set_mesh(mesh):
      weights = reader.weights(params)
    bridge = params["bridge"]["token_PKD"][...] if hasattr(model, "bridge") else None
    return cls(reader, weights, tuple(stop_ids), vocab, bridge, rows)

  def check(self, prompt: Prompt) -> None:
    """Raises ValueError where a prompt cannot be answered."""
    most, wanted = self.reader.arch.max_positions, prompt.sampling.max_new_tokens
    if not prompt.ids:
      raise ValueError("The prompt has no token; give one.")
    if len(prompt.ids) + wanted + self._offset > most:
      raise ValueError(
        f"The prompt has {len(prompt.ids)} tokens and max_new_tokens is {wanted}; the model was "
        f"made for {most} positions: shorten the persona or the post, or lower max_new_tokens."
      )
    if (prompt.preferences_PK is None) != (self.bridge_token_PKD is None):
      raise ValueError("A model with a learned bridge needs P̃, and no other can read it.")

  def generate(self, prompts: Sequence[Prompt]) -> Iterator[tuple[int, Generated]]:
    """Responses with the indices of their prompts, batch by batch; similar prompts go together.

    Raises:
      ValueError: a prompt cannot be answered; before any is.
    """
    for prompt in prompts:
      self.check(prompt)
    prefixes = common_prefixes(prompts)
    for indices in plan_batches(prompts, self.rows):
      batch = [prompts[i] for i in indices]
      state = self._decoding(batch, prefixes)
      state, found = self._decode(state, state.tokens_BR.shape[1])
      yield from zip(indices, self._generated(found), strict=False)

  def stream(self, prompt: Prompt, *, prefix: int = 0) -> Iterator[int]:
    """The tokens of one response as they are drawn, its end left out.

    Args:
      prefix: so many of the prompt's tokens are kept for the next prompt that has them.
    """
    self.check(prompt)
    state = self._decoding([prompt], {prompt.group: min(prefix, len(prompt.ids) - 1)})
    for step in range(prompt.sampling.max_new_tokens):
      state, found = self._decode(state, step + 1)
      token = int(found[0][0, step])
      if token in self.stop_ids:
        return
      yield token

  def start(self, batch: Sequence[Prompt], prefixes: dict, room: int) -> Started:
    """Reads a batch of prompts, all but their last tokens; fills the batch up with its last.

    Args:
      prefixes: length of each group's common prefix.
      room: slots for the response.
    """
    rows = self.batch_rows(len(batch))
    filled = [*batch, *[batch[-1]] * (rows - len(batch))]
    mesh = self.reader.mesh
    groups = list(dict.fromkeys(group_of(prompt) for prompt in filled))
    first = {group_of(prompt): prompt for prompt in reversed(filled)}
    lengths = {group: prefixes.get(first[group].group, 0) for group in groups}
    prefix, of_B = None, np.zeros(rows, np.int32)
    if any(lengths.values()) or self.bridge_token_PKD is not None:
      of_B = np.array([groups.index(group_of(prompt)) for prompt in filled], np.int32)
      prefix = self._read_prefixes([(first[group], lengths[group]) for group in groups])
    rest = [list(prompt.ids)[lengths[group_of(prompt)] : -1] for prompt in filled]
    tokens_BC = padded(rest, bucket(max(map(len, rest))))
    skipped_B = np.array([lengths[group_of(prompt)] for prompt in filled], np.int32)
    slots = 0 if prefix is None else prefix.is_seen_BT.shape[1]
    program = start_program(self.reader, slots + tokens_BC.shape[1] + room)
    arrays = tokens_BC, np.array([len(ids) for ids in rest], np.int32), skipped_B + self._offset
    with jax.set_mesh(mesh):
      arrays = jax.device_put((*arrays, of_B), meshes.rows_sharding(mesh, rows))
      cache = program(self.weights, prefix, *arrays)
    lengths_B = np.array([len(prompt.ids) for prompt in filled], np.int32)
    input_B = np.array([prompt.ids[-1] for prompt in filled], np.int32)
    return Started(cache, slots + tokens_BC.shape[1], input_B, lengths_B - 1 + self._offset)

  def batch_rows(self, prompts: int) -> int:
    """Rows of a batch of so many prompts: a power of two on each device."""
    shards = meshes.row_shards(self.reader.mesh)
    return shards * (1 << (-(-prompts // shards) - 1).bit_length())

  @property
  def _offset(self) -> int:
    """Position of a prompt's first token."""
    return int(self.bridge_token_PKD is not None)

  def _read_prefixes(self, groups: Sequence[tuple[Prompt, int]]) -> Cache:
    """The caches of prefixes, by group; the last ones are kept."""
    ids = [list(prompt.ids)[:length] for prompt, length in groups]
    preferences = [prompt.preferences_PK for prompt, _ in groups]
    key = [(*x, None if p is None else p.tobytes()) for x, p in zip(ids, preferences, strict=True)]
    if self._kept.get("key") == key:
      return self._kept["cache"]
    more = self.batch_rows(len(ids)) - len(ids)
    ids, preferences = ids + [[]] * more, preferences + preferences[-1:] * more
    size = bucket(max(map(len, ids)))
    arrays = padded(ids, size), np.array([len(x) for x in ids], np.int32)
    if self.bridge_token_PKD is None:
      preferences_UPK = None
    else:
      preferences_UPK = np.stack(preferences).astype(np.float32)
    program = prefix_program(self.reader)
    mesh = self.reader.mesh
    with jax.set_mesh(mesh):
      arrays = jax.device_put((*arrays, preferences_UPK), meshes.rows_sharding(mesh, len(ids)))
      cache = program(self.weights, self.bridge_token_PKD, *arrays)
    self._kept.update(key=key, cache=cache)
    return cache

  def _decoding(self, batch: Sequence[Prompt], prefixes: dict) -> Decoding:
    room = bucket(max(prompt.sampling.max_new_tokens for prompt in batch))
    started = self.start(batch, prefixes, room)
    rows = len(started.input_B)
    arrays = input_arrays(batch, rows)
    count_B, ended_B = np.zeros(rows, np.int32), np.zeros(rows, bool)
    tokens_BR = np.zeros((rows, room), np.int32)
    of_rows = tokens_BR, started.input_B, started.position_B, *arrays, count_B, ended_B
    mesh = self.reader.mesh
    of_rows = jax.device_put(of_rows, meshes.rows_sharding(mesh, rows))
    return Decoding(started.cache, *of_rows, jax.device_put(np.int32(0), meshes.replicated(mesh)))

  def _decode(self, state: Decoding, stop: int):
    slot = state.cache.is_seen_BT.shape[1] - state.tokens_BR.shape[1]
    program = decode_program(self.reader, self.stop_ids, self.vocab, slot)
    with jax.set_mesh(self.reader.mesh):
      return program(self.weights, state, np.int32(stop))

  def _generated(self, found) -> Iterator[Generated]:
    for tokens_R, count, ended in zip(*map(np.asarray, found), strict=True):
      yield Generated(tokens_R[: count - ended].tolist(), bool(ended), int(count))
