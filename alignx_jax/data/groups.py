"""The group of an example: what its user states of their age or gender, or prefers."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from alignx_jax.data.records import Example
from alignx_jax.personas.demographics import GROUPS, stated
from alignx_jax.personas.preferences import NEUTRAL, PreferenceSpace

HOLDERS = ("positive", "negative", "neutral")
NOT_KNOWN = "not known"
_SAMPLE = 4096  # examples of which groups are counted


def group_of(example: Example, by: str, space: PreferenceSpace) -> str:
  """An example's group.

  Args:
    by: a key of personas.demographics.GROUPS: what the description states, else NOT_STATED. Or a
      pole: whether the record's directions are `positive`, which is that pole, `negative` or
      `neutral` on its dimension; NOT_KNOWN if the record has none.
  Raises:
    ValueError: no such attribute and no such pole.
  """
  if by in GROUPS:
    return stated(example.persona.description, by)
  dimension, direction = space.find(by)
  if example.directions is None or not np.isfinite(example.directions[dimension]):
    return NOT_KNOWN
  value = example.directions[dimension]
  return "neutral" if value == NEUTRAL else "positive" if value == direction else "negative"


@dataclasses.dataclass(frozen=True)
class Grouping:
  """The groups of a data set by an attribute, and how large each is.

  Attributes:
    by: see group_of.
    names: the groups, in the order of their numbers.
    shares: of the examples, above 0.
  """

  by: str
  space: PreferenceSpace
  names: tuple[str, ...]
  shares: tuple[float, ...]

  def __call__(self, example: Example) -> int:
    """The number of an example's group; −1 for one that was not met when they were counted."""
    name = group_of(example, self.by, self.space)
    return self.names.index(name) if name in self.names else -1


def count_groups(examples: Sequence[Example], by: str, space: PreferenceSpace) -> Grouping:
  """The groups of examples, counted on some 4,096 that are spread evenly."""
  places = np.unique(np.linspace(0, len(examples) - 1, min(_SAMPLE, len(examples))).astype(int))
  found = [group_of(examples[int(i)], by, space) for i in places]
  names, counts = np.unique(found, return_counts=True)
  return Grouping(by, space, tuple(names.tolist()), tuple((counts / counts.sum()).tolist()))
