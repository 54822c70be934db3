"""The packed row: several examples, each context once, two response regions beside it.

    [context region, C | chosen region, R | rejected region, R]        L = C + 2R

The context's last token is moved to the front of each response region: response inputs
are [last context token, y1 … y(n−1)], targets [y1 … yn]. Predictions are then local to
their region, and only 2R positions of a row ever meet the vocabulary.

Where a learned bridge stands between persona and response (models/bridge.py), or a latent
variable (models/latent.py), the context is the prompt without the persona, and personas have
a region of their own, U tokens, which only that reads. A persona there is a set of parts (its
acts, the description, the post), each a sequence by itself.
"""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np


@dataclasses.dataclass(frozen=True)
class Regions:
  """Static sizes of a row: C, R and U in tokens, E the most examples in a row.

  Attributes:
    persona: U, of the region beside the layout that a learned bridge reads; 0 without one.
    parts: X, the most parts of personas in that region.
  """

  context: int
  response: int
  examples: int
  persona: int = 0
  parts: int = 0

  @property
  def layout(self) -> int:
    return self.context + 2 * self.response

  @property
  def room(self) -> tuple[int, ...]:
    """What a row has of all that Tokenised.sizes counts."""
    persona = (self.persona, self.parts) if self.persona else ()
    return self.context, self.response, self.response, *persona


class Personas(NamedTuple):
  """The persona region of a batch of rows: parts of personas, X of them, and their labels.

  Labels are twice the preference direction: 0, 1, 2; −1 where it is not known.

  Attributes:
    tokens_BU: input ids.
    positions_BU: position within the part.
    parts_BU: the part that a token is of, 1 … X, 0 for padding.
    segments_BX: the example that a part is of, as in Rows.
    kinds_BX: what a part is, index in personas.prompts.PART_KINDS.
    acts_BXP: int8 labels of the act that a part is of; None where no labels are read.
    labels_BEP: int8 labels of the example; likewise.
  """

  tokens_BU: np.ndarray
  positions_BU: np.ndarray
  parts_BU: np.ndarray
  segments_BX: np.ndarray
  kinds_BX: np.ndarray
  acts_BXP: np.ndarray | None
  labels_BEP: np.ndarray | None


class Rows(NamedTuple):
  """A batch of packed rows, as NumPy or JAX arrays.

  Attributes:
    tokens_BL: input ids.
    positions_BL: position within the example; a response goes on where its context ends.
    segments_BL: 1, 2, … for the row's examples, 0 for padding.
    targets_BNR: the id to predict at each response position.
    weight_BE: 1 for a real example, 0 for an empty slot.
    reference_BNE: response log-probs under the frozen reference, nats; 0 if not cached.
    example_BE: slot of the example in its stream (data/stream.py), −1 for an empty slot.
    personas: what a learned bridge infers P̃ from, if there is one and P̃ is not given.
    preferences_BEPK: P̃ where it is given: the probabilities of negative, neutral, positive.
    group_BE: number of the example's group, where groups are weighted; −1 for none.
  """

  tokens_BL: np.ndarray
  positions_BL: np.ndarray
  segments_BL: np.ndarray
  targets_BNR: np.ndarray
  weight_BE: np.ndarray
  reference_BNE: np.ndarray
  example_BE: np.ndarray
  personas: Personas | None = None
  preferences_BEPK: np.ndarray | None = None
  group_BE: np.ndarray | None = None


class TokenisedPart(NamedTuple):
  """Token ids of a part of a persona, its kind, and the labels [P] of its act, if known."""

  ids: list[int]
  kind: int
  labels: np.ndarray | None = None


class Tokenised(NamedTuple):
  """Token ids of one example's parts, and how many history items had to go.

  Attributes:
    persona: the persona's parts, for a learned bridge; None without one.
    labels: the record's [P], for a learned bridge, if known.
    group: number of the example's group, −1 for none.
  """

  context: list[int]
  chosen: list[int]
  rejected: list[int]
  dropped: int = 0
  persona: tuple[TokenisedPart, ...] | None = None
  labels: np.ndarray | None = None
  group: int = -1

  @property
  def sizes(self) -> tuple[int, ...]:
    """Tokens taken of each region, and parts: the context's last is in the response regions."""
    persona = ()
    if self.persona is not None:
      persona = sum(len(part.ids) for part in self.persona), len(self.persona)
    return len(self.context) - 1, len(self.chosen), len(self.rejected), *persona


def lay_out(
  examples: Sequence[Tokenised],
  regions: Regions,
  *,
  indices: Sequence[int],
  references: Sequence | None = None,
  dimensions: int = 0,
  preferences: Sequence | None = None,
  grouped: bool = False,
) -> Rows:
  """One row, unbatched (no axis B), of examples that fit it together.

  Args:
    indices: each example's index in its stream.
    references: each example's reference log-probs [N]; None where not cached.
    dimensions: P, for a learned bridge; 0 where no labels are read.
    preferences: each example's P̃ [P, K], for a learned bridge to which it is given.
    grouped: whether the row says which group each example is of.
  """
  C, R, E = regions.context, regions.response, regions.examples
  tokens_L, positions_L, segments_L = np.zeros((3, regions.layout), np.int32)
  targets_NR = np.zeros((2, R), np.int32)
  weight_E = np.zeros(E, np.float32)
  reference_NE = np.zeros((2, E), np.float32)
  example_E = np.full(E, -1, np.int32)
  starts = [0, C, C + R]
  for e, example in enumerate(examples):
    *before, last = example.context
    inputs = before, [last, *example.chosen[:-1]], [last, *example.rejected[:-1]]
    for branch, ids in enumerate(inputs, start=-1):
      start = starts[branch + 1]
      end = starts[branch + 1] = start + len(ids)
      first = 0 if branch < 0 else len(before)
      tokens_L[start:end] = ids
      positions_L[start:end] = np.arange(first, first + len(ids))
      segments_L[start:end] = e + 1
      if branch >= 0:
        offset = C + branch * R
        targets_NR[branch, start - offset : end - offset] = example[1 + branch]
    weight_E[e], example_E[e] = 1, indices[e]
    if references is not None:
      reference_NE[:, e] = references[e]
  row = Rows(tokens_L, positions_L, segments_L, targets_NR, weight_E, reference_NE, example_E)
  if grouped:
    group_E = np.full(E, -1, np.int32)
    group_E[: len(examples)] = [example.group for example in examples]
    row = row._replace(group_BE=group_E)
  if preferences is not None:
    preferences_EPK = np.zeros((E, dimensions, 3), np.float32)
    preferences_EPK[: len(examples)] = np.reshape(preferences, (-1, dimensions, 3))
    return row._replace(preferences_BEPK=preferences_EPK)
  if regions.persona:
    return row._replace(personas=_lay_out_personas(examples, regions, dimensions))
  return row


def _lay_out_personas(examples: Sequence[Tokenised], regions: Regions, dimensions: int) -> Personas:
  tokens_U, positions_U, parts_U = np.zeros((3, regions.persona), np.int32)
  segments_X, kinds_X = np.zeros((2, regions.parts), np.int32)
  acts_XP = np.full((regions.parts, dimensions), -1, np.int8)
  labels_EP = np.full((regions.examples, dimensions), -1, np.int8)
  end = x = 0
  for e, example in enumerate(examples):
    for part in example.persona:
      start, end = end, end + len(part.ids)
      tokens_U[start:end] = part.ids
      positions_U[start:end] = np.arange(len(part.ids))
      segments_X[x], kinds_X[x] = e + 1, part.kind
      if part.labels is not None:
        acts_XP[x] = part.labels
      x += 1
      parts_U[start:end] = x
    if example.labels is not None:
      labels_EP[e] = example.labels
  labels = (acts_XP, labels_EP) if dimensions else (None, None)
  return Personas(tokens_U, positions_U, parts_U, segments_X, kinds_X, *labels)


def stack(rows: Sequence[Rows]) -> Rows:
  """Rows as a batch."""

  def join(arrays):
    if arrays[0] is None:
      return None
    if isinstance(arrays[0], Personas):
      return Personas(*map(join, zip(*arrays, strict=True)))
    return np.stack(arrays)

  return Rows(*map(join, zip(*rows, strict=True)))
