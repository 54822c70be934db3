"""What is answered, and which prompts are answered together."""

import dataclasses
import math
from collections.abc import Hashable, Sequence
from typing import NamedTuple

import numpy as np

from alignx_jax.inference.kv_cache import bucket
from alignx_jax.inference.sampling import Settings


@dataclasses.dataclass(frozen=True)
class Sampling:
  """How one response is drawn.

  Attributes:
    temperature: 0 takes the most probable token each time.
    top_k: only so many most probable tokens; 0 for all.
    top_p: only the fewest most probable tokens that have this probability together.
    max_new_tokens: the most tokens of the response, its end among them.
    seed: the same one gives the same response.
  Raises:
    ValueError: names the field and what it may be.
  """

  temperature: float = 1.0
  top_k: int = 0
  top_p: float = 1.0
  max_new_tokens: int = 256
  seed: int = 0

  def __post_init__(self):
    for name, kind, fits, told in (
      ("temperature", float, lambda x: 0 <= x < math.inf, "0, for the most probable, or more"),
      ("top_k", int, lambda x: 0 <= x < 2**31, "0, for all tokens, or more"),
      ("top_p", float, lambda x: 0 < x <= 1, "above 0 and at most 1, for all tokens"),
      ("max_new_tokens", int, lambda x: 1 <= x < 2**31, "1 or more"),
      ("seed", int, lambda x: 0 <= x < 2**32, "from 0 to 2^32 − 1"),
    ):
      value = getattr(self, name)
      is_number = isinstance(value, int if kind is int else int | float)
      if not is_number or isinstance(value, bool) or not fits(value):
        number = "whole number" if kind is int else "number"
        raise ValueError(f"{name} is {value!r}; give a {number}, {told}.")


@dataclasses.dataclass(frozen=True, eq=False)
class Prompt:
  """What a response is drawn for.

  Attributes:
    ids: token ids, the context of training.
    group: prompts of the same one begin alike, as those of a persona; None for none.
    preferences_PK: P̃ that a learned bridge tells, the same within a group; or None.
  """

  ids: Sequence[int]
  sampling: Sampling = Sampling()
  group: Hashable = None
  preferences_PK: np.ndarray | None = None


class Generated(NamedTuple):
  """A response.

  Attributes:
    ids: its tokens, without the one that ended it.
    is_ended: whether it ended by itself, and not at the most tokens.
    tokens: how many were drawn, the end among them.
  """

  ids: list[int]
  is_ended: bool
  tokens: int


def input_arrays(batch: Sequence[Prompt], rows: int):
  """Seeds [B], Settings and limits [B] of a batch; rows beyond it are greedy and draw nothing."""
  of = [prompt.sampling for prompt in batch]
  more = rows - len(of)
  array = lambda name, fill, dtype: np.array([getattr(x, name) for x in of] + [fill] * more, dtype)
  settings = Settings(
    array("temperature", 0, np.float32), array("top_k", 0, np.int32), array("top_p", 1, np.float32)
  )
  return array("seed", 0, np.uint32), settings, array("max_new_tokens", 0, np.int32)


def common_prefixes(prompts: Sequence[Prompt]) -> dict[Hashable, int]:
  """Tokens that all prompts of a group begin with, their last ones left out; of groups of two."""
  found = {}
  for prompt in prompts:
    if prompt.group is not None:
      other, length, count = found.get(prompt.group, (prompt.ids, len(prompt.ids) - 1, 0))
      pairs = enumerate(zip(other[:length], prompt.ids[:-1], strict=False))
      length = min(length, len(prompt.ids) - 1)
      length = next((i for i, (a, b) in pairs if a != b), length)
      found[prompt.group] = other, length, count + 1
  return {group: length for group, (_, length, count) in found.items() if count > 1}


def plan_batches(prompts: Sequence[Prompt], rows: int) -> list[list[int]]:
  """Indices of the prompts of each batch: groups stay together, and sizes beside sizes."""
  longest: dict[Hashable, int] = {}
  for prompt in prompts:
    group = group_of(prompt)
    longest[group] = max(longest.get(group, 0), bucket(len(prompt.ids)))
  rank = {group: i for i, group in enumerate(longest)}

  def order(i):
    group = group_of(prompts[i])
    alone = prompts[i].group is None
    size = bucket(prompts[i].sampling.max_new_tokens)
    return size, longest[group], -1 if alone else rank[group], len(prompts[i].ids)

  indices = sorted(range(len(prompts)), key=order)
  return [indices[start : start + rows] for start in range(0, len(indices), rows)]


def group_of(prompt: Prompt) -> Hashable:
  """A prompt's group; one of its own where it has none."""
  return id(prompt) if prompt.group is None else ("group", prompt.group)


def padded(ids: Sequence[Sequence[int]], size: int) -> np.ndarray:
  """Token ids [X, size], 0 after the end of each."""
  padded = np.zeros((len(ids), size), np.int32)
  for row, x in zip(padded, ids, strict=True):
    row[: len(x)] = x
  return padded
