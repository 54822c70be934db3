"""The packed row: several examples, each context once, two response regions beside it.

    [context region, C | chosen region, R | rejected region, R]        L = C + 2R

The context's last token is moved to the front of each response region: response inputs
are [last context token, y1 … y(n−1)], targets [y1 … yn]. Predictions are then local to
their region, and only 2R positions of a row ever meet the vocabulary.
"""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np


@dataclasses.dataclass(frozen=True)
class Regions:
  """Static sizes of a row: C and R in tokens, E the most examples in a row."""

  context: int
  response: int
  examples: int

  @property
  def layout(self) -> int:
    return self.context + 2 * self.response


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
  """

  tokens_BL: np.ndarray
  positions_BL: np.ndarray
  segments_BL: np.ndarray
  targets_BNR: np.ndarray
  weight_BE: np.ndarray
  reference_BNE: np.ndarray
  example_BE: np.ndarray


class Tokenised(NamedTuple):
  """Token ids of one example's parts, and how many history items had to go."""

  context: list[int]
  chosen: list[int]
  rejected: list[int]
  dropped: int = 0

  @property
  def sizes(self) -> tuple[int, int, int]:
    """Tokens taken of each region: the context's last is in the response regions."""
    return len(self.context) - 1, len(self.chosen), len(self.rejected)


def lay_out(
  examples: Sequence[Tokenised],
  regions: Regions,
  *,
  indices: Sequence[int],
  references: Sequence | None = None,
) -> Rows:
  """One row, unbatched (no axis B), of examples that fit it together.

  Args:
    indices: each example's index in its stream.
    references: each example's reference log-probs [N]; None where not cached.
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
  return Rows(tokens_L, positions_L, segments_L, targets_NR, weight_E, reference_NE, example_E)


def stack(rows: Sequence[Rows]) -> Rows:
  """Rows as a batch."""
  return Rows(*map(np.stack, zip(*rows, strict=True)))
