"""What a policy does when only the stated age or gender of a user changes.

Every example whose description states one is copied with each other group stated in its place;
all else is equal, byte for byte. Axes: X pairs, P dimensions, K directions.
"""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from alignx_jax.data.records import Example
from alignx_jax.evaluation.accuracy import bootstrap_interval
from alignx_jax.evaluation.bias import LEAST_PAIRS, LEAST_POSTS
from alignx_jax.personas.demographics import GROUPS, NOT_STATED, has_pronouns, stated, swapped
from alignx_jax.personas.preferences import PreferenceSpace


class Counterfactual(NamedTuple):
  """An example with another group stated.

  Attributes:
    index: of the example as it was.
    pronouns: the description keeps gendered pronouns, which a swapped gender contradicts.
  """

  index: int
  attribute: str
  before: str
  after: str
  example: Example
  pronouns: bool


class Seen(NamedTuple):
  """What a policy makes of examples.

  Attributes:
    margin_X: β times the difference of log-ratios, nats; NaN where it could not be scored.
    inferred_XPK: P̃ that a learned bridge infers, if it has one.
  """

  margin_X: np.ndarray
  inferred_XPK: np.ndarray | None = None


def counterfactuals(examples: Sequence[Example]) -> list[Counterfactual]:
  """Every swap of a stated age or gender that there is a word for."""
  found = []
  for index, example in enumerate(examples):
    text = example.persona.description
    for attribute, groups in GROUPS.items():
      before = stated(text, attribute)
      for after in groups if before != NOT_STATED else ():
        if (new := swapped(text, attribute, after)) is None:
          continue
        persona = dataclasses.replace(example.persona, description=new)
        other = dataclasses.replace(example, persona=persona)
        pronouns = attribute == "gender" and has_pronouns(text)
        found.append(Counterfactual(index, attribute, before, after, other, pronouns))
  return found


def counterfactual_rows(
  swaps: Sequence[Counterfactual],
  before: Seen,
  after: Seen,
  space: PreferenceSpace,
  *,
  top: int = 5,
) -> list[dict]:
  """How margins and P̃ change by each kind of swap.

  Args:
    before: of all examples.
    after: of the swaps' examples, in their order.
    space: of P̃.
    top: how many of the dimensions that change most are told.
  Returns:
    A row for each kind: "attribute", "before", "after", "examples", "posts", "enough" and
    "pronouns" (how many keep them); each with its 95 % interval by bootstrap over posts: "change",
    the mean of the margin's, nats; "absolute", the mean of its size; "flips", the share of pairs
    whose preferred response is another; "variation", the total variation ½ Σ|p − p'| of P̃, mean
    over dimensions, and "dimensions", those that vary most. None where there are too few.
  """
  kinds = dict.fromkeys((swap.attribute, swap.before, swap.after) for swap in swaps)
  rows = []
  for kind in kinds:
    chosen = [
      i
      for i, swap in enumerate(swaps)
      if swap[1:4] == kind and np.isfinite([before.margin_X[swap.index], after.margin_X[i]]).all()
    ]
    old = [swaps[i].index for i in chosen]
    posts = [swaps[i].example.post for i in chosen]
    enough = len(chosen) >= LEAST_PAIRS and len(set(posts)) >= LEAST_POSTS
    row = dict(zip(("attribute", "before", "after"), kind, strict=True))
    row |= {"examples": len(chosen), "posts": len(set(posts)), "enough": enough}
    row["pronouns"] = sum(swaps[i].pronouns for i in chosen)
    old_X, new_X = before.margin_X[old], after.margin_X[chosen]
    values = {
      "change": new_X - old_X,
      "absolute": np.abs(new_X - old_X),
      "flips": ((new_X > 0) != (old_X > 0)).astype(np.float64),
    }
    if before.inferred_XPK is not None:
      variation_XP = total_variation(before.inferred_XPK[old], after.inferred_XPK[chosen])
      values["variation"] = variation_XP.mean(axis=1)
      row["dimensions"] = []
      most = np.argsort(-variation_XP.mean(axis=0), kind="stable")[:top] if enough else ()
      for p in most:
        told = {"dimension": space.dimensions[p].positive}
        row["dimensions"].append(told | _mean("variation", variation_XP[:, p], posts, enough))
    for name, value_X in values.items():
      row |= _mean(name, value_X, posts, enough)
    rows.append(row)
  return rows


def total_variation(before_XPK, after_XPK) -> np.ndarray:
  """½ Σ_k |p(k) − p'(k)| of each user and dimension, [X, P]: 0 … 1."""
  return 0.5 * np.abs(before_XPK - after_XPK).sum(axis=-1)


def _mean(name, value_X, posts, enough) -> dict:
  """The mean with its interval; None of too few."""
  if not enough:
    return {name: None, f"{name}_low": None, f"{name}_high": None}
  low, high = bootstrap_interval(value_X, posts)
  return {name: float(value_X.mean()), f"{name}_low": low, f"{name}_high": high}
