"""The order of a stream of examples: shuffled epochs, or sources mixed at given rates."""

import dataclasses
from collections.abc import Sequence

import grain
import numpy as np


def mixing_rates(sizes: Sequence[int], temperature: float) -> np.ndarray:
  """Shares of sources of these sizes: proportional to size^(1 / temperature), as T5's are.

  At temperature 1 each example is as likely as any other; higher ones favour small sources.

  Raises:
    ValueError: a temperature that is not positive.
  """
  if temperature <= 0:
    raise ValueError(f"The temperature is {temperature}; it must be above 0.")
  weights = np.asarray(sizes, np.float64) ** (1 / temperature)
  return weights / weights.sum()


@dataclasses.dataclass(frozen=True)
class Place:
  """What stands at a position of a stream.

  Attributes:
    example: index of the example.
    epoch: how often it has come before.
    slot: a number that no other (example, epoch) of the stream has, below Stream.slots.
  """

  example: int
  epoch: int
  slot: int


class Stream:
  """Which example stands at each position: a function of the seed and the position alone.

  Every source is shuffled anew each time it has been gone through. Where there are several
  with rates, they take turns as evenly as can be: of any first n positions a source has its
  rate times n, give or take one for each source.
  """

  def __init__(
    self,
    groups: Sequence[np.ndarray | range],
    *,
    length: int,
    seed: int | None,
    rates: Sequence[float] = (1.0,),
  ):
    """
    Args:
      groups: indices of each source's examples.
      length: positions.
      seed: of the order; None keeps the order of the indices.
      rates: share of each source; a source with rate 0 does not come.
    Raises:
      ValueError: a rate for no or an empty source.
    """
    if len(rates) != len(groups) or any(
      rate and not len(group) for rate, group in zip(rates, groups, strict=True)
    ):
      raise ValueError(f"{len(groups)} sources do not go with the rates {list(rates)}.")
    self.length, self._groups = length, groups
    # How often each source is gone through, whole or in part.
    counts = [length]
    self._turns = None
    if len(groups) > 1:
      counts = [int(np.ceil(rate * length)) + 1 if rate > 0 else 0 for rate in rates]
      keys = [(np.arange(n) + 0.5) / max(r, 1e-300) for n, r in zip(counts, rates, strict=True)]
      sources = np.repeat(np.arange(len(groups)), counts).astype(np.int16)
      ranks = np.concatenate([np.arange(n, dtype=np.int32) for n in counts])
      order = np.argsort(np.concatenate(keys), kind="stable")[:length]
      self._turns = sources[order], ranks[order]
    epochs = [-(-n // max(1, len(g))) for n, g in zip(counts, groups, strict=True)]
    spans = [n * len(g) for n, g in zip(epochs, groups, strict=True)]
    self._starts = np.concatenate([[0], np.cumsum(spans)])
    self._orders = [self._order(len(group), seed, i) for i, group in enumerate(groups)]

  @staticmethod
  def _order(size, seed, source):
    if seed is None or size == 0:
      return None
    # One source is shuffled by the seed itself.
    return grain.MapDataset.range(size).shuffle(seed=(seed + 7919 * source) % 2**32).repeat()

  @property
  def slots(self) -> int:
    return int(self._starts[-1])

  def __len__(self) -> int:
    return self.length

  def __getitem__(self, position: int) -> Place:
    source, rank = 0, position
    if self._turns is not None:
      source, rank = (int(x[position]) for x in self._turns)
    group, order = self._groups[source], self._orders[source]
    inside = rank % len(group) if order is None else order[rank]
    epoch = rank // len(group)
    slot = int(self._starts[source]) + epoch * len(group) + inside
    return Place(int(group[inside]), epoch, slot)

  def example(self, slot: int) -> int:
    """Index of the example of a slot."""
    source = int(np.searchsorted(self._starts, slot, side="right")) - 1
    return int(self._groups[source][(slot - int(self._starts[source])) % len(self._groups[source])])
