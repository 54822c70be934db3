"""Batches of packed rows, the same whoever reads them and from wherever one goes on.

The stream of examples (shuffled anew each epoch, a function of the seed and the position)
is dealt out to as many lanes as the global batch has rows: lane i gets positions i, i + B,
i + 2B, …. Each step takes one row from every lane, packed from a window of the lane's next
examples, so a lane needs to know nothing of the others. Hence batches depend neither on
the number of hosts nor on that of their workers, and where a lane stands is a few
integers, which go with every batch.
"""

import collections
import contextlib
import dataclasses
import functools
import zlib
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import grain
import numpy as np
from absl import flags, logging

from alignx_jax.data.formatting import Formatting, Refused, tokenise
from alignx_jax.data.groups import Grouping
from alignx_jax.data.records import Example
from alignx_jax.data.rows import Regions, Rows, Tokenised, lay_out, stack
from alignx_jax.data.stream import Place, Stream
from alignx_jax.personas.persona import HistoryPolicy, sample_history

# Raised when other examples come to share a row: a run goes on only as it began.
PACKING = 2


class Batch(NamedTuple):
  """A batch, and where the stream goes on after it.

  Attributes:
    rows: with B = this host's lanes.
    lanes_BW: int32; of each lane the next position, then those read but not yet in a row,
      oldest first, and −1 for no more. Give it to `batches` to go on.
  """

  rows: Rows
  lanes_BW: np.ndarray


def choose(sizes: Sequence[tuple[int, ...]], regions: Regions) -> list[int]:
  """Which of a window's examples share the next row.

  The oldest, so that none waits for ever; beside it the largest, while they leave room for
  some two more; then the two that together fill the row best; then what still fits.

  Args:
    sizes: tokens of each region of Regions.room, oldest example first.
  Returns:
    Indices, ascending.
  Raises:
    ValueError: the oldest fits no row.
  """
  sizes_WR = np.asarray(sizes)
  room_R = np.array(regions.room)
  left_R = room_R - sizes_WR[0]
  if left_R.min() < 0:
    raise ValueError(f"An example of {sizes[0]} tokens is longer than the regions {room_R}.")
  taken = [0]
  # The share of the row that an example needs says which is large.
  largest_first = np.argsort(-(sizes_WR / room_R).max(axis=1), kind="stable").tolist()
  room_of_two_R = 2.5 * sizes_WR.mean(axis=0)

  def take(indices):
    nonlocal left_R
    taken.extend(indices)
    left_R = left_R - sizes_WR[indices].sum(axis=0)

  def fitting():
    if len(taken) >= regions.examples:
      return []
    fits_W = (sizes_WR <= left_R).all(axis=1)
    return [i for i in largest_first if fits_W[i] and i not in taken]

  while (left_R > room_of_two_R).all() and (rest := fitting()):
    take(rest[:1])
  if rest := fitting():
    # A pair with the nothing at the end is one example alone.
    parts_MR = np.concatenate([sizes_WR[rest], np.zeros_like(sizes_WR[:1])])
    first, second = np.triu_indices(len(parts_MR), 1)
    if len(taken) + 1 == regions.examples:
      first, second = first[second == len(rest)], second[second == len(rest)]
    sums = parts_MR[first] + parts_MR[second]
    best = np.argmax(np.where((sums <= left_R).all(axis=1), sums.sum(axis=1), -1))
    take([rest[i] for i in (first[best], second[best]) if i < len(rest)])
  while rest := fitting():
    take(rest[:1])
  return sorted(taken)


@dataclasses.dataclass
class Loader:
  """Batches of packed rows from examples.

  Attributes:
    examples: the data set; the stream is this, shuffled anew each epoch.
    rows: B, rows of a batch.
    epochs: passes over the data.
    seed: of order and history; None keeps the order.
    mixture: indices of each source's examples, and its share of the stream; None takes all
      examples alike.
    window: examples of a lane among which a row chooses; more pack tighter.
    workers: the most processes that tokenise and pack, of which so many are used as divide
      the rows that are read here; 0 does it in this one.
    reference: response log-probs under the reference, None until computed: [slots, N], or
      [examples, N] if the reference's prompt shows nothing that is drawn.
    preferences: P̃ of each example [examples, P, K], where it is given to a learned bridge.
    grouping: of the examples, where groups are weighted.
    counts: refused examples by reason and dropped history items, so far as it was read.
  """

  examples: Sequence[Example]
  formatting: Formatting
  rows: int
  epochs: int = 1
  seed: int | None = None
  window: int = 32
  workers: int = 0
  mixture: tuple[Sequence[np.ndarray], Sequence[float]] | None = None
  reference: np.ndarray | None = None
  preferences: np.ndarray | None = None
  grouping: Grouping | None = None
  counts: collections.Counter = dataclasses.field(default_factory=collections.Counter)

  @property
  def stream_length(self) -> int:
    """Examples in the whole stream, refused ones included."""
    return len(self.examples) * self.epochs

  def report_counts(self, what: str) -> None:
    """Warns of what the loader refused and dropped since it was last asked."""
    for reason, count in self.counts.items():
      logging.warning("%s: %d of %d examples: %s", what, count, self.stream_length, reason)
    self.counts.clear()

  def start(self) -> np.ndarray:
    """Where the stream begins: `lanes_BW` of no batch yet."""
    lanes_BW = np.full((self.rows, 1 + self.window), -1, np.int32)
    lanes_BW[:, 0] = np.arange(self.rows)
    return lanes_BW

  def batches(
    self, lanes_BW: np.ndarray | None = None, *, endless: bool = False
  ) -> Iterator[Batch]:
    """The stream's batches from its start, or after the batch that had these lanes.

    Args:
      lanes_BW: all lanes, or those whose rows this host reads; the next batches have these
        rows of the global ones.
      endless: go on with empty rows once these lanes have ended, as others may not have.
    """
    lanes_BW = self.start() if lanes_BW is None else np.asarray(lanes_BW)
    size = len(lanes_BW)
    # Each worker takes as many lanes as any other.
    workers = max((n for n in range(1, self.workers + 1) if size % n == 0), default=0)
    if workers and not flags.FLAGS.is_parsed():
      flags.FLAGS.mark_as_parsed()  # grain reads its flags, also in a notebook
    options = grain.MultiprocessingOptions(num_workers=workers)
    packed = iter(_Lanes(self, lanes_BW).mp_prefetch(options))
    with contextlib.closing(packed):
      while True:
        rows, lanes, counts = zip(*(next(packed) for _ in range(size)), strict=True)
        for count in counts:
          self.counts.update(count)
        batch = Batch(stack(rows), np.stack(lanes))
        if not endless and not batch.rows.weight_BE.any():  # every lane has ended
          return
        yield batch

  def tokenised(self, position: int) -> tuple[Place, Tokenised]:
    """What stands at a position of the stream, and its token ids.

    Raises:
      Refused: the example cannot be used.
    """
    place = self.stream[position]
    example = self.examples[place.example]
    persona = example.persona
    if self.formatting.history != HistoryPolicy():
      rng = history_rng(self.seed or 0, place.epoch, example.id)
      persona = sample_history(persona, self.formatting.history, rng)
    ids = tokenise(example, self.formatting, persona)
    return place, ids._replace(group=self.grouping(example)) if self.grouping else ids

  @functools.cached_property
  def stream(self) -> Stream:
    """Which example stands where."""
    groups, rates = self.mixture or ([range(len(self.examples))], [1.0])
    return Stream(groups, length=self.stream_length, seed=self.seed, rates=rates)


def history_rng(seed: int, epoch: int, id: str) -> np.random.Generator:
  """What draws the history of an example: the same wherever it stands in whichever order."""
  return np.random.default_rng([seed, epoch, zlib.crc32(id.encode())])


class _Lanes(grain.IterDataset):
  """Packed rows of some lanes in turn, each with its lane's state and counts; endless."""

  def __init__(self, loader: Loader, lanes_BW: np.ndarray):
    super().__init__()
    self._loader, self._lanes_BW = loader, lanes_BW

  def set_slice(self, sl: slice, sequential_slice: bool = False):
    """Keeps the lanes of one worker."""
    self._lanes_BW = self._lanes_BW[sl]

  def __iter__(self):
    return _LanesIterator(self._loader, self._lanes_BW)


class _LanesIterator(grain.DatasetIterator):
  def __init__(self, loader, lanes_BW):
    super().__init__()
    self._lanes = [_Lane(loader, lane_W) for lane_W in lanes_BW]
    self._turn = 0

  def __next__(self):
    lane = self._lanes[self._turn]
    self._turn = (self._turn + 1) % len(self._lanes)
    return lane.row()

  def get_state(self):
    return {}  # a row brings its lane's state along: nothing asks the iterator for it

  def set_state(self, state):
    raise NotImplementedError


class _Lane:
  """One lane: a window of tokenised examples, and rows chosen from it."""

  def __init__(self, loader: Loader, lane_W: np.ndarray):
    self._loader = loader
    self._next, *waiting = map(int, lane_W)
    self._counts = collections.Counter()
    self._window = []  # (position, Place, Tokenised)
    for position in waiting:
      if position >= 0:
        self._read(position)
    self._counts.clear()  # what was read before was counted before

  def _read(self, position):
    try:
      place, ids = self._loader.tokenised(position)
    except Refused as reason:
      self._counts[f"refused, {reason}"] += 1
      return
    if ids.dropped:
      self._counts["too long, oldest history items dropped"] += 1
    self._window.append((position, place, ids))

  def row(self) -> tuple[Rows, np.ndarray, collections.Counter]:
    """The next row, empty when the lane has ended; the lane's state after it; new counts."""
    loader = self._loader
    while len(self._window) < loader.window and self._next < loader.stream_length:
      self._read(self._next)
      self._next += loader.rows
    regions = loader.formatting.regions
    taken = choose([ids.sizes for _, _, ids in self._window], regions) if self._window else []
    _, places, examples = zip(*(self._window[i] for i in taken), strict=True) if taken else [()] * 3
    references = None
    if loader.reference is not None:
      each_draw = loader.formatting.of_reference().history.random
      references = [loader.reference[p.slot if each_draw else p.example] for p in places]
    preferences = None
    if loader.preferences is not None:
      preferences = [loader.preferences[p.example] for p in places]
    row = lay_out(
      examples,
      regions,
      indices=[place.slot for place in places],
      references=references,
      dimensions=loader.formatting.dimensions,
      preferences=preferences,
      grouped=loader.grouping is not None,
    )
    self._window = [item for i, item in enumerate(self._window) if i not in taken]
    lane_W = np.full(1 + loader.window, -1, np.int32)
    lane_W[0] = self._next
    lane_W[1 : 1 + len(self._window)] = [position for position, *_ in self._window]
    counts, self._counts = self._counts, collections.Counter()
    return row, lane_W, counts
