"""The preference space: what the dimensions are, and how directions become text.

A direction is one dimension's value: 1 positive, 0 negative, 0.5 neutral, NaN unknown.
Dimensions are data: a JSON file of one's own is as good a space as AlignX's 90, and what
was learnt in an older space is carried over by the dimensions' names.
"""

import dataclasses
import difflib
import functools
import itertools
import json
from pathlib import Path

import numpy as np

from alignx_jax.files import as_path

NEUTRAL = 0.5


@dataclasses.dataclass(frozen=True)
class Dimension:
  """One axis of preference, named by its two poles; equal where both poles are.

  Attributes:
    formerly: a pole's text in an older space, if this is that dimension renamed.
  """

  group: str = dataclasses.field(compare=False)
  positive: str
  negative: str
  formerly: str = dataclasses.field(default="", compare=False, repr=False)


@dataclasses.dataclass(frozen=True)
class PreferenceSpace:
  """An ordered tuple of dimensions; P is its length.

  Spaces are equal where their dimensions have the same poles in the same order, whatever
  the spaces and the dimensions' groups are called.
  """

  dimensions: tuple[Dimension, ...]
  # Not in the repr, of which the keys of cached log-probs are made: no name changes those.
  name: str = dataclasses.field(default="unnamed", compare=False, repr=False)

  @classmethod
  def from_json(cls, path) -> "PreferenceSpace":
    """Reads {"name", "dimensions"}, or the list of dimensions alone, named as the file is.

    A dimension is {"group", "positive", "negative"}, with "formerly" if it is an older
    space's, renamed. Order is the index.

    Raises:
      ValueError: the file is no such thing; names the dimension, what is wrong and the fix.
    """
    try:
      content = json.loads(as_path(path).read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
      raise ValueError(f"{path} is not JSON ({error}); mend it.") from error
    if isinstance(content, list):
      content = {"name": Path(path).stem, "dimensions": content}
    match content:
      case {"name": str(name), "dimensions": [_, *_] as entries} if name.strip():
        pass
      case _:
        raise ValueError(
          f"{path} is no preference space; make it a list of one dimension or more, or an "
          'object of a "name" (text) and such a list as "dimensions".'
        )
    space = cls(
      tuple(_dimension(entry, f"{path}: dimension {i}") for i, entry in enumerate(entries)), name
    )
    poles = [pole for d in space.dimensions for pole in (d.positive, d.negative)]
    if len(space._poles) != len(poles):
      twice = next(pole for pole in poles if poles.count(pole) > 1)
      raise ValueError(f"{path}: two poles have the same text, {twice!r}; each must be unique.")
    return space

  def to_json(self) -> str:
    """The text of a file that `from_json` reads as this space, names and groups included."""
    dimensions = [dataclasses.asdict(dimension) for dimension in self.dimensions]
    for dimension in dimensions:
      if not dimension["formerly"]:
        del dimension["formerly"]
    content = {"name": self.name, "dimensions": dimensions}
    return json.dumps(content, ensure_ascii=False, indent=1) + "\n"

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

  def find(self, name: str) -> tuple[int, float]:
    """A pole's text to its dimension's index and its direction, 1 or 0.

    Raises:
      ValueError: no pole reads so; suggests the nearest.
    """
    if name not in self._poles:
      raise self._no_pole(name)
    return self._poles[name]

  def _no_pole(self, name: str) -> ValueError:
    folded = {pole.casefold(): pole for pole in self._poles}
    near = [repr(folded[f]) for f in difflib.get_close_matches(str(name).casefold(), folded)]
    hint = f" Did you mean {' or '.join(near)}?" if near else ""
    return ValueError(f"{name!r} is no pole of the preference space {self.name!r}.{hint}")

  def check_size(self, size: int):
    """Raises a ValueError unless that is how many dimensions there are."""
    if size != len(self):
      raise ValueError(
        f"{size} directions for the preference space {self.name!r} of {len(self)} dimensions; "
        "use the space that they were labelled in."
      )

  def check_same(self, other: "PreferenceSpace", what: str):
    """Refuses what was made with a space other than this one.

    Args:
      what: the thing that is of the other space, as a sentence begins: "The saved head".
    Raises:
      ValueError: names both spaces, the first dimension that differs and what to do.
    """
    if self == other:
      return
    pairs = itertools.zip_longest(self.dimensions, other.dimensions)
    index, (here, there) = next((i, pair) for i, pair in enumerate(pairs) if pair[0] != pair[1])
    poles = lambda d: f"{d.positive!r} / {d.negative!r}" if d else "nothing"
    raise ValueError(
      f"{what} is of the preference space {other.name!r} ({len(other)} dimensions) and the one "
      f"in use is {self.name!r} ({len(self)}): the first that differs is number {index}, "
      f"{poles(here)} here and {poles(there)} there. Use the space that it was made with "
      "(config.data.space), or carry it over by name (PreferenceSpace.rows_from)."
    )

  def rows_from(self, old: "PreferenceSpace") -> np.ndarray:
    """Where each dimension was in an older space, by name.

    The same dimension is the one with the same poles, or else the one that `formerly`
    names by either pole.

    Returns:
      int [P]: an index into `old`'s dimensions, −1 where the dimension is new.
    Raises:
      ValueError: `formerly` names no pole of `old`, two dimensions are the same old one,
        or a dimension's poles have changed places, so that directions would change sign.
    """
    rows = {dimension: row for row, dimension in enumerate(old.dimensions)}
    rows_P = np.full(len(self), -1)
    claimed: dict[int, Dimension] = {}
    for index, dimension in enumerate(self.dimensions):
      here = f"The dimension {dimension.positive!r} of the preference space {self.name!r}"
      flipped = dataclasses.replace(
        dimension, positive=dimension.negative, negative=dimension.positive
      )
      row = rows.get(dimension, rows.get(flipped))
      if row is None and dimension.formerly:
        try:
          row, _ = old.find(dimension.formerly)
        except ValueError as error:
          raise ValueError(f"{here} is 'formerly' one that is not there: {error}") from None
      if row is None:
        continue
      was = old.dimensions[row]
      if dimension.positive == was.negative or dimension.negative == was.positive:
        raise ValueError(
          f"{here} was {was.positive!r} / {was.negative!r} in {old.name!r}: its poles have "
          "changed places, and old directions would mean the opposite; exchange them again."
        )
      if row in claimed:
        raise ValueError(
          f"{here} and {claimed[row].positive!r} are both {was.positive!r} of {old.name!r}; "
          "only one can be: take 'formerly' from the other, or give it poles of its own."
        )
      claimed[row] = dimension
      rows_P[index] = row
    return rows_P

  def translate(self, directions_P, old: "PreferenceSpace") -> np.ndarray:
    """Directions given in an older space's order, in this space's.

    Args:
      directions_P: [..., dimensions of `old`].
    Returns:
      float [..., P]: NaN, unknown, where the dimension is new.
    Raises:
      ValueError: as `rows_from`, or they are not as many as `old` has dimensions.
    """
    directions_P = np.asarray(directions_P)
    old.check_size(directions_P.shape[-1])
    rows_P = self.rows_from(old)
    return np.where(rows_P >= 0, directions_P[..., rows_P], np.nan)

  def aggregate(
    self, history_KP, *, positive_from: float = 0.6, negative_to: float = 0.4
  ) -> np.ndarray:
    """A history's directions to one set of directions, as the AlignX release does.

    The mean over the items in which it is known, then 1 where that is ≥ `positive_from`,
    0 where it is < `negative_to`, else neutral. (The paper says ≤ 0.4; the release compares a
    float32 mean, in which 2 / 5 lies above 0.4, and its published profiles show it.) If that
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
    history_KP = np.asarray(history_KP, np.float64)
    self.check_size(history_KP[0].size)
    known_P = np.sum(~np.isnan(history_KP), axis=0)
    mean_P = np.where(known_P, np.nansum(history_KP, axis=0) / np.maximum(known_P, 1), NEUTRAL)
    directions_P[mean_P >= positive_from] = 1.0
    directions_P[mean_P < negative_to] = 0.0
    distance_P = np.abs(mean_P - NEUTRAL)
    if np.all(directions_P == NEUTRAL) and distance_P.max() > 0:
      extreme_P = np.isclose(distance_P, distance_P.max())
      directions_P[extreme_P] = (mean_P > NEUTRAL)[extreme_P]
    return directions_P

  def verbalise(self, directions_P) -> str:
    """The non-neutral poles joined with ", " in index order; what is unknown is not said."""
    self.check_size(len(directions_P))
    return ", ".join(
      dimension.positive if direction > NEUTRAL else dimension.negative
      for dimension, direction in zip(self.dimensions, directions_P, strict=True)
      if direction != NEUTRAL and not np.isnan(direction)
    )

  def parse(self, text: str) -> np.ndarray:
    """Inverse of `verbalise`.

    Raises:
      ValueError: the text has a part that is no pole of this space, or both poles of a dimension.
    """
    directions_P = np.full(len(self), NEUTRAL)
    longest_first = sorted(self._poles, key=len, reverse=True)
    rest = text.strip()
    while rest:
      for pole in longest_first:
        if rest == pole or rest.startswith(pole + ", "):
          index, direction = self._poles[pole]
          if directions_P[index] not in (NEUTRAL, direction):
            raise ValueError(f"{pole!r} contradicts the other pole of its dimension, said before.")
          directions_P[index] = direction
          rest = rest[len(pole) + 2 :]
          break
      else:
        raise self._no_pole(rest.split(", ")[0])
    return directions_P


def _dimension(entry, where: str) -> Dimension:
  """One entry of a space's file; `where` names it in errors."""
  if not isinstance(entry, dict):
    raise ValueError(f"{where} is a {type(entry).__name__}; make it an object.")
  for key in ("group", "positive", "negative"):
    if key not in entry:
      raise ValueError(f"{where} has no {key!r}; add it.")
    text = entry[key]
    # Space at an end would be lost between `verbalise` and `parse`.
    if not isinstance(text, str) or not text or text != text.strip():
      raise ValueError(f"{where} has {text!r} as {key!r}; make it text with no space at its ends.")
  formerly = entry.get("formerly", "")
  if not isinstance(formerly, str):
    raise ValueError(
      f"{where} has {formerly!r} as 'formerly'; make it a pole's text in an older space."
    )
  return Dimension(entry["group"], entry["positive"], entry["negative"], formerly)


@functools.cache
def alignx_space() -> PreferenceSpace:
  """The 90 dimensions of AlignX (arXiv 2503.15463, appendix A)."""
  space = PreferenceSpace.from_json(Path(__file__).with_name("preference_space.json"))
  return dataclasses.replace(space, name="alignx")
