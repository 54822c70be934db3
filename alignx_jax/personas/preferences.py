"""The preference space: what the dimensions are, and how directions become text.

A direction is one dimension's value: 1 positive, 0 negative, 0.5 neutral.
"""

import dataclasses
import difflib
import functools
import json
from pathlib import Path

import numpy as np

NEUTRAL = 0.5


@dataclasses.dataclass(frozen=True)
class Dimension:
  """One axis of preference, named by its two poles."""

  group: str
  positive: str
  negative: str


@dataclasses.dataclass(frozen=True)
class PreferenceSpace:
  """An ordered tuple of dimensions; P is its length."""

  dimensions: tuple[Dimension, ...]

  @classmethod
  def from_json(cls, path) -> "PreferenceSpace":
    """Reads a list of {"group", "positive", "negative"}; order is the index.

    Raises:
      ValueError: an entry lacks a pole, or two poles read the same.
    """
    entries = json.loads(Path(path).read_text(encoding="utf-8"))
    dimensions = []
    for i, entry in enumerate(entries):
      missing = [key for key in ("group", "positive", "negative") if key not in entry]
      if missing:
        raise ValueError(f"{path}: dimension {i} has no {missing[0]!r}; add it.")
      dimensions.append(Dimension(entry["group"], entry["positive"], entry["negative"]))
    space = cls(tuple(dimensions))
    if len(space._poles) != 2 * len(dimensions):
      raise ValueError(f"{path}: two poles have the same text; each must be unique.")
    return space

  def __len__(self) -> int:
    return len(self.dimensions)

  @functools.cached_property
  def groups(self) -> dict[str, list[int]]:
    """Indices of each group's dimensions, in order."""
    groups: dict[str, list[int]] = {}
    for index, dimension in enumerate(self.dimensions):
      groups.setdefault(dimension.group, []).append(index)
    return groups

  @functools.cached_property
  def _poles(self) -> dict[str, tuple[int, float]]:
    """Pole text to (index, direction)."""
    poles = {}
    for index, dimension in enumerate(self.dimensions):
      poles[dimension.positive] = (index, 1.0)
      poles[dimension.negative] = (index, 0.0)
    return poles

  def aggregate(
    self, history_KP, *, positive_from: float = 0.6, negative_to: float = 0.4
  ) -> np.ndarray:
    """A history's directions to one set of directions, as the AlignX release does.

    The mean over items, then 1 where it is ≥ `positive_from`, 0 where it is <
    `negative_to`, else neutral. (The paper says ≤ 0.4; the release compares a float32
    mean, in which 2 / 5 lies above 0.4, and its published profiles show it.) If that
    leaves nothing, the dimensions whose mean is farthest from neutral are taken all the
    same, unless every mean is exactly neutral.

    Args:
      history_KP: directions of each history item; no items give all neutral.
    Returns:
      float64 [P] of {0, 0.5, 1}.
    """
    directions_P = np.full(len(self), NEUTRAL)
    if not len(history_KP):
      return directions_P
    mean_P = np.mean(np.asarray(history_KP, np.float64), axis=0)
    if mean_P.shape != directions_P.shape:
      raise ValueError(f"{mean_P.size} directions for a space of {len(self)} dimensions.")
    directions_P[mean_P >= positive_from] = 1.0
    directions_P[mean_P < negative_to] = 0.0
    distance_P = np.abs(mean_P - NEUTRAL)
    if np.all(directions_P == NEUTRAL) and distance_P.max() > 0:
      extreme_P = np.isclose(distance_P, distance_P.max())
      directions_P[extreme_P] = (mean_P > NEUTRAL)[extreme_P]
    return directions_P

  def verbalise(self, directions_P) -> str:
    """The non-neutral poles joined with ", " in index order."""
    if len(directions_P) != len(self):
      raise ValueError(f"{len(directions_P)} directions for a space of {len(self)} dimensions.")
    return ", ".join(
      dimension.positive if direction > NEUTRAL else dimension.negative
      for dimension, direction in zip(self.dimensions, directions_P, strict=True)
      if direction != NEUTRAL
    )

  def parse(self, text: str) -> np.ndarray:
    """Inverse of `verbalise`.

    Raises:
      ValueError: the text has a part that is no pole of this space.
    """
    directions_P = np.full(len(self), NEUTRAL)
    longest_first = sorted(self._poles, key=len, reverse=True)
    rest = text.strip()
    while rest:
      for pole in longest_first:
        if rest == pole or rest.startswith(pole + ", "):
          index, directions_P[index] = self._poles[pole]
          rest = rest[len(pole) + 2 :]
          break
      else:
        part = rest.split(", ")[0]
        near = difflib.get_close_matches(part, longest_first, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"{part!r} is no pole of this preference space.{hint}")
    return directions_P


@functools.cache
def alignx_space() -> PreferenceSpace:
  """The 90 dimensions of AlignX (arXiv 2503.15463, appendix A)."""
  return PreferenceSpace.from_json(Path(__file__).with_name("preference_space.json"))
