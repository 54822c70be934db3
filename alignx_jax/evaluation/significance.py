"""Whether two accuracies on the same pairs differ by more than chance."""

import math
from collections.abc import Mapping, Sequence

import numpy as np

# Discordant pairs up to which p is exact; beyond, the normal approximation with continuity
# correction agrees to three digits.
_EXACT = 10_000


def mcnemar(first_only: int, second_only: int) -> float:
  """Two-sided p of McNemar's test: are discordant pairs as often of the one kind as the other?

  Exact (a binomial test with probability ½) up to 10,000 of them, else by the normal approximation.
  1 where there is none.

  Args:
    first_only, second_only: pairs that only the first, only the second has right.
  """
  total, least = first_only + second_only, min(first_only, second_only)
  if total == 0:
    return 1.0
  if total <= _EXACT:
    ways = tail = 1  # to choose k of them, and at most k: whole numbers, so nothing is rounded
    for k in range(least):
      ways = ways * (total - k) // (k + 1)
      tail += ways
    return min(1.0, 2 * tail / 2**total)
  z = max(0.0, abs(first_only - second_only) - 1) / math.sqrt(total)
  return math.erfc(z / math.sqrt(2))


def paired_interval(
  difference: np.ndarray, groups: Sequence, *, samples: int = 2000, seed: int = 0
) -> tuple[float, float]:
  """95 % percentile interval of a mean difference, resampling whole groups with replacement.

  Args:
    difference: of each pair, second − first.
    groups: each pair's group, such as its user.
  """
  _, member = np.unique(np.asarray(groups, object).astype(str), return_inverse=True)
  total, size = np.bincount(member, weights=difference), np.bincount(member)
  rng = np.random.default_rng(seed)
  means = []
  for _ in range(samples):  # one at a time: there may be 100,000 users
    drawn = rng.integers(len(size), size=len(size))
    means.append(total[drawn].sum() / size[drawn].sum())
  low, high = np.percentile(means, [2.5, 97.5])
  return float(low), float(high)


def compare_pairs(first: Mapping[str, np.ndarray], second: Mapping[str, np.ndarray]) -> dict:
  """Two rows of an evaluation on the pairs that both have scored, matched by their ids.

  Args:
    first, second: columns "id", "user", "post" and "correct", NaN where not scored, as
      record_table.row_groups gives.
  Returns:
    "pairs" compared; "first" and "second", their accuracies on these; "difference", second − first,
    with 95 % intervals "by_user" and "by_post"; "first_only" and "second_only", how many pairs only
    one has right, and McNemar's "p". And who is left out: "only_in_first", "only_in_second", ids
    that the other has not; "unscored", pairs that one of the two could not score. Without a pair,
    the figures are missing.
  Raises:
    ValueError: an id occurs twice in one of them.
  """
  places = []
  for name, columns in (("first", first), ("second", second)):
    place = {id: i for i, id in enumerate(columns["id"])}
    if len(place) < len(columns["id"]):
      raise ValueError(
        f"The {name} has {len(columns['id']) - len(place)} record ids twice: files of one name? "
        "Evaluate again with names that differ."
      )
    places.append(place)
  common = [id for id in places[0] if id in places[1]]
  outcomes = [
    np.array([columns["correct"][place[id]] for id in common], float)
    for columns, place in zip((first, second), places, strict=True)
  ]
  known_X = np.isfinite(outcomes[0]) & np.isfinite(outcomes[1])
  found = {
    "pairs": int(known_X.sum()),
    "only_in_first": len(places[0]) - len(common),
    "only_in_second": len(places[1]) - len(common),
    "unscored": int((~known_X).sum()),
  }
  if not known_X.any():
    return found
  before, after = (outcome[known_X] for outcome in outcomes)
  kept = [places[0][id] for id, known in zip(common, known_X, strict=True) if known]
  difference = after - before
  first_only, second_only = int((difference < 0).sum()), int((difference > 0).sum())
  return found | {
    "first": float(before.mean()),
    "second": float(after.mean()),
    "difference": float(difference.mean()),
    "by_user": paired_interval(difference, [first["user"][i] for i in kept]),
    "by_post": paired_interval(difference, [first["post"][i] for i in kept]),
    "first_only": first_only,
    "second_only": second_only,
    "p": mcnemar(first_only, second_only),
  }
