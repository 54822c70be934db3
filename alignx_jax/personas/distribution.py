"""P̃, an explicit preference distribution: to look at, and to steer by hand."""

import dataclasses
import numbers
from collections.abc import Mapping

import numpy as np

from alignx_jax.personas.preferences import NEUTRAL, PreferenceSpace

# What the columns of probabilities_PK stand for, and the direction of each.
COLUMNS = ("negative", "neutral", "positive")
DIRECTIONS_K = np.array([0.0, NEUTRAL, 1.0])
_NEGATIVE, _, _POSITIVE = range(3)


@dataclasses.dataclass(frozen=True, eq=False)
class Preferences:
  """A preference distribution P̃ over a space.

  Attributes:
    probabilities_PK: float64 [P, 3]: negative, neutral, positive. Read-only; what is given is
      copied, and its rows, which must sum to 1 within 1e-3, are normalised.
  Raises:
    ValueError: another shape, or a row that is no distribution; names the dimension.
  """

  space: PreferenceSpace
  probabilities_PK: np.ndarray

  def __post_init__(self):
    space, probabilities_PK = self.space, np.array(self.probabilities_PK, np.float64)
    if probabilities_PK.shape != (len(space), 3):
      raise ValueError(
        f"Probabilities of shape {probabilities_PK.shape} for the preference space "
        f"{space.name!r} of {len(space)} dimensions: give ({len(space)}, 3), a row (negative, "
        "neutral, positive) for each dimension of the space that they were inferred in."
      )
    bad_P = ~np.all(np.isfinite(probabilities_PK) & (probabilities_PK >= 0), axis=1)
    if bad_P.any():
      index = int(np.argmax(bad_P))
      raise ValueError(
        f"The probabilities of {space.dimensions[index].positive!r} are "
        f"{probabilities_PK[index].tolist()}: each must be finite and not negative; "
        "give probabilities, not logits."
      )
    sum_P = probabilities_PK.sum(axis=1)
    bad_P = np.abs(sum_P - 1) > 1e-3
    if bad_P.any():
      index = int(np.argmax(bad_P))
      raise ValueError(
        f"The probabilities of {space.dimensions[index].positive!r} sum to {sum_P[index]:.6g}: "
        "each dimension's three must sum to 1; take the softmax over the last axis in float32."
      )
    # A row that is normalised already keeps its bits, so that steering leaves the others be.
    rough_P = np.abs(sum_P - 1) > 1e-14
    probabilities_PK[rough_P] /= sum_P[rough_P, None]
    probabilities_PK.setflags(write=False)
    object.__setattr__(self, "probabilities_PK", probabilities_PK)

  @classmethod
  def from_directions(cls, space: PreferenceSpace, directions_P) -> "Preferences":
    """All probability on the directions given, [P] of 0, 0.5 or 1.

    Raises:
      ValueError: they are not P, or one is something else; names the dimension.
    """
    directions_P = np.asarray(directions_P, np.float64)
    space.check_size(len(directions_P))
    one_hot_PK = directions_P[..., None] == DIRECTIONS_K
    bad_P = ~one_hot_PK.any(axis=-1)
    if bad_P.any():
      index = int(np.argmax(bad_P))
      raise ValueError(
        f"The direction of {space.dimensions[index].positive!r} is {directions_P[index]}; "
        "use 0, 0.5 or 1 (0.5 too where it is unknown)."
      )
    return cls(space, one_hot_PK)

  @classmethod
  def neutral(cls, space: PreferenceSpace) -> "Preferences":
    """All probability on neutral: nothing is known, or nothing is wanted."""
    return cls.from_directions(space, np.full(len(space), NEUTRAL))

  def __getitem__(self, pole: str) -> float:
    """A pole's probability; raises a ValueError with the nearest poles where there is none."""
    index, direction = self.space.find(pole)
    return float(self.probabilities_PK[index] @ (direction == DIRECTIONS_K))

  def with_preferences(self, strengths: Mapping[str, float]) -> "Preferences":
    """Steers by hand: each pole named takes a share of its dimension's probability.

    A strength s gives p' = (1 − s) p + s · onehot(pole): 0 changes nothing, and 1 leaves
    nothing but the pole.

    Args:
      strengths: a pole's text to s, such as {"Likes humor": 1.0, "Dislikes gaming": 0.4}.
    Raises:
      ValueError: no such pole, both poles of a dimension, or a strength outside 0..1.
    """
    probabilities_PK = self.probabilities_PK.copy()
    named: dict[int, str] = {}
    for pole, strength in strengths.items():
      index, direction = self.space.find(pole)
      if index in named:
        raise ValueError(f"{named[index]!r} and {pole!r} are poles of one dimension; keep one.")
      named[index] = pole
      number = isinstance(strength, numbers.Real) and not isinstance(strength, bool)
      if not number or not 0 <= strength <= 1:
        raise ValueError(
          f"The strength of {pole!r} is {strength!r}; give a number from 0, which changes "
          "nothing, to 1, which leaves nothing but the pole."
        )
      one_hot_K = direction == DIRECTIONS_K
      probabilities_PK[index] = (1 - strength) * probabilities_PK[index] + strength * one_hot_K
    return Preferences(self.space, probabilities_PK)

  def top(self, n: int) -> list[tuple[str, float]]:
    """The n most probable poles and their probabilities, without the impossible ones.

    Of equally probable ones, the first in the space comes first, and positive before negative.
    """
    poles = [pole for d in self.space.dimensions for pole in (d.positive, d.negative)]
    probabilities = self.probabilities_PK[:, [_POSITIVE, _NEGATIVE]].ravel()
    order = np.argsort(-probabilities, kind="stable")[:n]
    return [(poles[i], float(probabilities[i])) for i in order if probabilities[i] > 0]

  def directions(self, threshold: float = 0.5) -> np.ndarray:
    """float64 [P]: a pole's direction where its probability is at least `threshold` and above
    the other pole's, else neutral."""
    negative_P = self.probabilities_PK[:, _NEGATIVE]
    positive_P = self.probabilities_PK[:, _POSITIVE]
    directions_P = np.full(len(self.space), NEUTRAL)
    directions_P[(positive_P >= threshold) & (positive_P > negative_P)] = 1.0
    directions_P[(negative_P >= threshold) & (negative_P > positive_P)] = 0.0
    return directions_P

  def verbalise(self, threshold: float = 0.5) -> str:
    """The text of `directions`, as a text bridge states it."""
    return self.space.verbalise(self.directions(threshold))

  def as_dict(self) -> dict[str, dict[str, float]]:
    """Each dimension's positive pole to {"negative": p, "neutral": p, "positive": p}."""
    return {
      dimension.positive: dict(zip(COLUMNS, row_K.tolist(), strict=True))
      for dimension, row_K in zip(self.space.dimensions, self.probabilities_PK, strict=True)
    }

  def __str__(self) -> str:
    """The ten most probable poles, a line each, with their probabilities."""
    top = self.top(10)
    width = max((len(pole) for pole, _ in top), default=0)
    lines = [f"{pole:<{width}}  {100 * probability:5.1f} %" for pole, probability in top]
    return "\n".join(lines) or f"neutral in all {len(self.space)} dimensions"

  __repr__ = __str__  # what a notebook shows
