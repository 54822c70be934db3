"""The packed row: several examples, each context once, two response regions beside it.

    [context region, C | chosen region, R | rejected region, R]        L = C + 2R

The context's last token is moved to the front of each response region: response inputs
are [last context token, y1 … y(n−1)], targets [y1 … yn]. Predictions are then local to
their region, and only 2R positions of a row ever meet the vocabulary.
"""

import dataclasses
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
    example_BE: index of the example in its stream, −1 for an empty slot.
  """

  tokens_BL: np.ndarray
  positions_BL: np.ndarray
  segments_BL: np.ndarray
  targets_BNR: np.ndarray
  weight_BE: np.ndarray
  reference_BNE: np.ndarray
  example_BE: np.ndarray


def make_features(context, chosen, rejected, *, index: int, reference=(0.0, 0.0)) -> dict:
  """One example's features for the packer, from the token ids of its three parts.

  A region's second axis holds inputs and targets, so that both are packed alike.
  """
  moved = context[-1:]
  branches = [
    np.stack([np.asarray(moved + y[:-1]), np.asarray(y)], axis=1).astype(np.int32)
    for y in (chosen, rejected)
  ]
  return {
    "context": np.asarray(context[:-1], np.int32),
    "chosen": branches[0],
    "rejected": branches[1],
    "context_length": np.asarray([len(context) - 1], np.int32),
    "index": np.asarray([index], np.int64),
    "reference": np.asarray([reference], np.float32),
  }


PER_EXAMPLE = ("context_length", "index", "reference")


def length_struct(regions: Regions) -> dict[str, int]:
  """What the packer needs to know: the size of each feature in a row."""
  sizes = {"context": regions.context, "chosen": regions.response, "rejected": regions.response}
  return sizes | dict.fromkeys(PER_EXAMPLE, regions.examples)


def assemble(packed: dict, *, rows: int) -> Rows:
  """Lays out what the packer emits, batched, adding empty rows up to `rows`."""

  def pad(x):
    return np.pad(x, [(0, rows - len(x))] + [(0, 0)] * (x.ndim - 1))

  packed = {name: pad(value) for name, value in packed.items()}
  branches = ("chosen", "rejected")
  segments = [packed[f"{name}_segment_ids"] for name in ("context", *branches)]
  examples = packed["index"].shape[1]
  count_B = np.maximum(segments[0].max(axis=1), segments[1].max(axis=1))
  real_BE = np.arange(examples) < count_B[:, None]

  # A response position is its offset plus the length of its example's context.
  offset_BE = np.pad(packed["context_length"], [(0, 0), (1, 0)])
  positions = [packed["context_positions"]] + [
    packed[f"{name}_positions"] + np.take_along_axis(offset_BE, segment, axis=1)
    for name, segment in zip(branches, segments[1:], strict=True)
  ]
  tokens = [packed["context"]] + [packed[name][..., 0] for name in branches]
  return Rows(
    tokens_BL=np.concatenate(tokens, axis=1),
    positions_BL=np.concatenate(positions, axis=1).astype(np.int32),
    segments_BL=np.concatenate(segments, axis=1),
    targets_BNR=np.stack([packed[name][..., 1] for name in branches], axis=1),
    weight_BE=real_BE.astype(np.float32),
    reference_BNE=packed["reference"].swapaxes(1, 2),
    example_BE=np.where(real_BE, packed["index"], -1),
  )
