"""Preferences that training never met: dimensions held out, and how fast they are then learnt.

One policy is aligned to users of whom no act is of a held-out dimension; then it, and the base, are
each trained on some examples of users who care about nothing else. How many more the base needs to
come as far is what alignment to the others was worth.
"""

from collections.abc import Collection, Mapping, Sequence

import numpy as np
from absl import logging

from alignx_jax.data.records import Example
from alignx_jax.personas.preferences import NEUTRAL, PreferenceSpace


def dimensions_of(space: PreferenceSpace, groups: Sequence[str]) -> list[int]:
  """Indices of the dimensions of some groups.

  Raises:
    ValueError: there is no such group.
  """
  for group in groups:
    if group not in space.groups:
      raise ValueError(f"config.study.held_out has {group!r}; there are {', '.join(space.groups)}.")
  return [index for group in groups for index in space.groups[group]]


def divide(
  examples: Sequence[Example], held_out: Collection[int]
) -> tuple[list[Example], list[Example]]:
  """Examples that have nothing of the held-out dimensions, and those whose pair is of no others.

  By the labels of the pair and of the history. What is neither, or lacks a label, is left out with
  a warning.
  """
  known, novel = [], []
  for example in examples:
    all_P = [example.directions, *(act.directions for act in example.persona.history)]
    if any(directions_P is None for directions_P in all_P):
      continue
    of_pair, *of_acts = (
      set(np.flatnonzero((d != NEUTRAL) & np.isfinite(d)).tolist()) for d in all_P
    )
    if of_pair and of_pair <= set(held_out):
      novel.append(example)
    elif of_pair.union(*of_acts).isdisjoint(held_out):
      known.append(example)
  if left := len(examples) - len(known) - len(novel):
    logging.warning(
      "%d of %d examples are of held-out dimensions and others, or lack labels: left out.",
      left,
      len(examples),
    )
  return known, novel


def needed(line: Mapping[int, float], target: float) -> float | None:
  """How many examples reach an accuracy, None where the most do not.

  Between two numbers that were measured, straight in the logarithm; the first crossing counts.

  Args:
    line: number of examples, 1 or more, to accuracy.
  """
  counts = sorted(line)
  if not counts:
    return None
  if line[counts[0]] >= target:
    return float(counts[0])  # or fewer
  for fewer, more in zip(counts, counts[1:], strict=False):
    if line[more] >= target:
      share = (target - line[fewer]) / (line[more] - line[fewer])
      return float(fewer * (more / fewer) ** share)
  return None


def savings(aligned: Mapping[int, float], base: Mapping[int, float]) -> dict[int, dict]:
  """For each number of examples of the aligned model: how many times as many the base needs.

  Args:
    aligned, base: number of examples to accuracy; of no examples nothing is said.
  Returns:
    {number: {"accuracy", "base_needs", "ratio", "at_least"}}; where the base never comes as far,
    its most examples are counted, and "at_least" is true.
  """
  base = {n: accuracy for n, accuracy in base.items() if n}
  found = {}
  for n, accuracy in sorted(aligned.items()):
    if n and base:
      examples = needed(base, accuracy)
      short = examples is None
      examples = float(max(base)) if short else examples
      found[n] = {
        "accuracy": accuracy,
        "base_needs": examples,
        "ratio": examples / n,
        "at_least": short,
      }
  return found
