"""A trained preference bridge at work: texts to evidence, evidence to P̃, P̃ to log-probs.

Everything that is compiled has sizes out of a few: powers of two, so that personas and posts of
any length share some programs.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from tqdm import tqdm

from alignx_jax.data.formatting import Formatting, tokenise, tokenise_parts
from alignx_jax.data.records import Example
from alignx_jax.data.rows import Personas, Regions, TokenisedPart, lay_out, stack
from alignx_jax.models.bridge import VALUES, Evidence, read
from alignx_jax.models.decoder import Decoder
from alignx_jax.personas.distribution import Preferences
from alignx_jax.personas.persona import Persona
from alignx_jax.personas.preferences import PreferenceSpace
from alignx_jax.personas.prompts import PART_KINDS, Part, text_of
from alignx_jax.training import hosts
from alignx_jax.training import mesh as meshes
from alignx_jax.training.steps import compiler_options, count_dimensions, score_program

# The most tokens (unless one part has more) and parts of a row, and rows of a device's batch.
_TOKENS, _PARTS, _ROWS = 1024, 64, 8
_HEAD_CHUNK = 128  # response positions at a time in the head
_ANY_LENGTH = 2**30


@dataclasses.dataclass(frozen=True, eq=False)
class PreferenceModel:
  """A model with a trained bridge, and all that it takes to use it.

  Attributes:
    model: shapes alone.
    params: its parameters, on the mesh.
    formatting: as it was trained; its regions and its history policy are not looked at.
    temperature: P̃ = softmax(log-odds / temperature).
  Raises:
    ValueError: the model has no bridge, or one of another size than the space; or the
      temperature is not above 0.
  """

  model: Decoder = dataclasses.field(repr=False)
  params: nnx.State = dataclasses.field(repr=False)
  mesh: Mesh = dataclasses.field(repr=False)
  formatting: Formatting = dataclasses.field(repr=False)
  temperature: float = 1.0

  def __post_init__(self):
    dimensions = count_dimensions(self.model)
    if not dimensions:
      raise ValueError(
        "The model has no learned bridge: train one with config.objective.name 'pba' and "
        "config.bridge.kind 'head'."
      )
    if dimensions != len(self.space):
      raise ValueError(
        f"The bridge has {dimensions} dimensions and the preference space {self.space.name!r} has "
        f"{len(self.space)}; give the formatting with the space that it was trained in."
      )
    if not 0 < self.temperature < np.inf:
      raise ValueError(f"The temperature is {self.temperature}; give a number above 0, 1 for none.")

  @classmethod
  def of(cls, experiment, params: nnx.State, *, temperature: float = 1.0) -> "PreferenceModel":
    """Of an experiment's model with these parameters."""
    return cls(experiment.model, params, experiment.mesh, experiment.formatting, temperature)

  @property
  def space(self) -> PreferenceSpace:
    """The dimensions of P̃."""
    return self.formatting.space_of_bridge

  def read(self, personas: Sequence[Sequence[Part]]) -> list[Evidence]:
    """What the parts of each persona say together, [P, Q, …] in float64.

    Raises:
      ValueError: a part is longer than what the model was made for; names it.
    """
    P = len(self.space)
    mass_XPQ, value_XPQV = np.zeros((len(personas), P, 2)), np.zeros((len(personas), P, 2, VALUES))
    owners = [x for x, parts in enumerate(personas) for _ in parts]
    parts = [part for parts in personas for part in self._tokenised(parts)]
    program = read_program(nnx.graphdef(self.model), self.mesh)
    for indices_BX, batch in self._batches(parts):
      found = Evidence(*map(np.asarray, self._run(program, batch)))
      for row, indices in enumerate(indices_BX):
        of = [owners[i] for i in indices]
        np.add.at(mass_XPQ, of, found.mass_PQ[row, : len(of)])
        np.add.at(value_XPQV, of, found.value_PQV[row, : len(of)])
    return list(map(Evidence, mass_XPQ, value_XPQV))

  def preferences(self, evidence: Evidence) -> Preferences:
    """P̃ by the evidence of one persona."""
    program = softmax_program(nnx.graphdef(self.model), self.mesh)
    with jax.set_mesh(self.mesh):
      return Preferences(self.space, program(self.params, evidence, self.temperature))

  def log_probs(self, post: str, responses: Sequence[str], preferences: Preferences) -> np.ndarray:
    """log π(y | x, P̃) of each response [responses] in nats; see preferences.score_responses."""
    self.space.check_same(preferences.space, "P̃")
    # Pairs of one example each; the last response fills up the last batch.
    per_batch = self._batch_size(-(-len(responses) // 2))
    filled = [*responses, *[responses[-1]] * (-len(responses) % (2 * per_batch))]
    any_length = Regions(_ANY_LENGTH, _ANY_LENGTH, 1)
    formatting = dataclasses.replace(self.formatting, regions=any_length)
    pairs = [
      tokenise(Example("", post, *pair, Persona()), formatting, Persona())
      for pair in zip(filled[::2], filled[1::2], strict=True)
    ]
    context, *longest = (max(sizes) for sizes in zip(*(pair.sizes for pair in pairs), strict=True))
    if (length := context + max(longest)) > self.model.arch.max_positions:
      raise ValueError(
        f"The post and a response have {length} tokens; the model was made for "
        f"{self.model.arch.max_positions}: shorten them."
      )
    regions = Regions(_bucket(context, 128), _bucket(max(longest), 128), 1)
    given = {"dimensions": len(self.space), "preferences": [preferences.probabilities_PK]}
    rows = [lay_out([pair], regions, indices=[i], **given) for i, pair in enumerate(pairs)]
    program = score_program(nnx.graphdef(self.model), self.mesh, _HEAD_CHUNK)
    scores = [
      np.asarray(self._run(program, stack(rows[start : start + per_batch]))[0])
      for start in range(0, len(rows), per_batch)
    ]
    return np.concatenate(scores).reshape(-1)[: len(responses)]

  def _tokenised(self, parts: Sequence[Part]) -> tuple[TokenisedPart, ...]:
    """Token ids of parts; what is known of their directions is not looked at."""
    tokenised = tokenise_parts([part._replace(directions=None) for part in parts], self.formatting)
    for part, tokens in zip(parts, tokenised, strict=True):
      if len(tokens.ids) > self.model.arch.max_positions:
        raise ValueError(
          f"The {PART_KINDS[part.kind]!r} part that begins {text_of(part.pieces)[:60]!r} has "
          f"{len(tokens.ids)} tokens; the model was made for {self.model.arch.max_positions}: "
          "shorten it."
        )
    return tokenised

  def _batches(self, parts: Sequence[TokenisedPart]) -> Iterator[tuple[list[list[int]], Personas]]:
    """Batches of parts, and which parts are in each of their rows."""
    if not parts:
      return
    sizes = [len(part.ids) for part in parts]
    room = _bucket(max(max(sizes), min(sum(sizes), _TOKENS)), 128)
    rows = _fill_rows(sizes, room)
    slots = _bucket(max(map(len, rows)), 8)
    per_batch = self._batch_size(len(rows), most=max(1, _ROWS * _TOKENS // room))
    starts = range(0, len(rows), per_batch)
    quiet = len(starts) < 4 or not hosts.is_first()
    for start in tqdm(starts, "reading personas", unit="batch", disable=quiet):
      batch = rows[start : start + per_batch]
      laid = [_lay_out([parts[i] for i in row], room, slots) for row in batch]
      laid += [_lay_out([], room, slots)] * (per_batch - len(batch))
      tokens, positions, numbers, kinds = map(np.stack, zip(*laid, strict=True))
      yield batch, Personas(tokens, positions, numbers, None, kinds, None, None)

  def _batch_size(self, rows: int, most: int = _ROWS) -> int:
    """Rows of a batch, at most so many for each device that rows are split over."""
    shards = meshes.row_shards(self.mesh)
    return shards * min(most, _bucket(-(-rows // shards), 1))

  def _run(self, program: Callable, batch):
    rows = len(jax.tree.leaves(batch)[0])
    with jax.set_mesh(self.mesh):
      return program(self.params, jax.device_put(batch, meshes.rows_sharding(self.mesh, rows)))


@functools.cache
def read_program(graph, mesh: Mesh) -> Callable:
  """(parameters, Personas) to the Evidence of each part [B, X, …]."""
  return jax.jit(
    lambda params, personas: read(nnx.merge(graph, params), personas),
    out_shardings=meshes.replicated(mesh),
    compiler_options=compiler_options(mesh),
  )


@functools.cache
def softmax_program(graph, mesh: Mesh) -> Callable:
  """(parameters, Evidence, temperature) to P̃ [..., P, K]."""

  def probabilities(params, evidence, temperature):
    return jax.nn.softmax(nnx.merge(graph, params).bridge.logits(evidence) / temperature)

  return jax.jit(probabilities, out_shardings=meshes.replicated(mesh))


def _bucket(size: int, least: int) -> int:
  """`least`, doubled until it holds so many."""
  while least < size:
    least *= 2
  return least


def _fill_rows(sizes: Sequence[int], room: int) -> list[list[int]]:
  """Indices of what comes in each row, in order, a new row where the last has no room left."""
  rows, left = [[]], room
  for i, size in enumerate(sizes):
    if size > left or len(rows[-1]) == _PARTS:
      rows.append([])
      left = room
    rows[-1].append(i)
    left -= size
  return rows


def _lay_out(parts: Sequence[TokenisedPart], room: int, slots: int):
  """The tokens, positions and parts [U] of a row of Personas, and the kinds [X] of its parts."""
  laid_3U, kinds_X = np.zeros((3, room), np.int32), np.zeros(slots, np.int32)
  end = 0
  for x, part in enumerate(parts):
    start, end = end, end + len(part.ids)
    laid_3U[:, start:end] = part.ids, range(len(part.ids)), [x + 1] * len(part.ids)
    kinds_X[x] = part.kind
  return *laid_3U, kinds_X
