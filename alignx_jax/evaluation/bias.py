"""Whether a policy serves some groups of users worse: accuracy, calibration and margin by group.

A group is what users state of their age or gender, or who prefers one pole of a dimension. Axes:
X test pairs, G groups, C posts, F counted columns, S bootstrap samples. Intervals resample whole
posts, as alignment accuracy does, once for all groups: a gap is of groups that met the same posts.
"""

from collections.abc import Sequence

import numpy as np

from alignx_jax.data.groups import HOLDERS, NOT_KNOWN, group_of
from alignx_jax.data.records import Example
from alignx_jax.evaluation.calibration import (
  bin_counts,
  calibration_error,
  chance_calibration_error,
)
from alignx_jax.personas.demographics import GROUPS, NOT_STATED
from alignx_jax.personas.preferences import PreferenceSpace

# Fewer pairs, or of fewer posts, say nothing of a group.
LEAST_PAIRS, LEAST_POSTS = 30, 10
# What a group's pairs are measured by, and the unit.
FIGURES = {"accuracy": "share", "margin": "nats", "overconfidence": "share"}
_BINS = 20  # of a confidence, which is 0.5 or more: half of them are used


def groups_of(examples: Sequence[Example], by: str, space: PreferenceSpace) -> list[str]:
  """The group of each example by "age", "gender" or a pole, see data.groups.group_of."""
  return [group_of(example, by, space) for example in examples]


def audit_groups(
  attribute: str,
  groups: Sequence[str],
  margin_X: np.ndarray,
  posts: Sequence[str],
  *,
  probabilities: bool = True,
  samples: int = 1000,
  seed: int = 0,
) -> tuple[list[dict], list[dict]]:
  """Figures of each group and the gaps between them.

  accuracy: share of margins above 0. margin: its mean. overconfidence: mean σ(|margin|), which
  is the probability that a DPO policy gives to the response that it prefers, less the accuracy.
  ece: calibration error of that probability (calibration.py), beside what chance makes of it.

  Args:
    attribute: what the groups are of.
    groups: of each pair.
    margin_X: β times the difference of log-ratios, nats; NaN where a pair could not be scored.
    posts: of each pair.
    probabilities: whether σ(margin) is the policy's, as of DPO; else nothing is said of
      calibration.
  Returns:
    Rows of groups: "attribute", "group", "examples", "posts", "enough", and each figure of FIGURES
    with "…_low", "…_high"; "ece", "ece_chance". Rows of gaps, each of two groups that are stated
    or known: "attribute", "groups", "enough", and each figure's difference, first minus second,
    likewise. Figures are None where there are too few pairs or posts.
  """
  scored_X = np.isfinite(margin_X)
  margin_X = np.asarray(margin_X, np.float64)[scored_X]
  groups, posts = (np.asarray(values, object)[scored_X] for values in (groups, posts))
  names = _ordered(attribute, set(groups))
  if not names:
    return [], []
  member_X = np.array([names.index(group) for group in groups])
  _, post_X = np.unique(posts.astype(str), return_inverse=True)
  counts_XF = _counts(margin_X)
  sums_CGF = np.zeros((post_X.max() + 1, len(names), counts_XF.shape[1]))
  np.add.at(sums_CGF, (post_X, member_X), counts_XF)
  posts_G, size_G = (sums_CGF[..., 0] > 0).sum(0), sums_CGF[..., 0].sum(0)
  enough_G = (size_G >= LEAST_PAIRS) & (posts_G >= LEAST_POSTS)
  figures_GM = _figures(sums_CGF.sum(0))
  figures_SGM = _resampled(sums_CGF, samples, seed)
  told = [name for name in FIGURES if probabilities or name != "overconfidence"]

  rows = []
  for g, name in enumerate(names):
    row = {"attribute": attribute, "group": name}
    row |= {"examples": int(size_G[g]), "posts": int(posts_G[g]), "enough": bool(enough_G[g])}
    row |= _told(figures_GM[g], figures_SGM[:, g], told if enough_G[g] else ())
    bins = sums_CGF[:, g, 4:].sum(0).reshape(_BINS, 4)
    measured = enough_G[g] and probabilities
    row["ece"] = float(calibration_error(bins)) if measured else None
    row["ece_chance"] = float(chance_calibration_error(bins)) if measured else None
    rows.append(row)
  gaps = []
  real = [g for g, name in enumerate(names) if name not in (NOT_STATED, NOT_KNOWN)]
  for a, b in ((a, b) for i, a in enumerate(real) for b in real[i + 1 :]):
    enough = bool(enough_G[a] and enough_G[b])
    row = {"attribute": attribute, "groups": [names[a], names[b]], "enough": enough}
    difference_SM = figures_SGM[:, a] - figures_SGM[:, b]
    row |= _told(figures_GM[a] - figures_GM[b], difference_SM, told if enough else ())
    gaps.append(row)
  return rows, gaps


def _ordered(attribute: str, found: set[str]) -> list[str]:
  order = (*GROUPS.get(attribute, ()), *HOLDERS, NOT_STATED, NOT_KNOWN)
  return sorted(found, key=lambda name: order.index(name) if name in order else len(order))


def _counts(margin_X):
  """What of each pair adds up, [X, F]: 1, hit, margin, confidence, and the bins' sums."""
  hit_X = margin_X > 0
  confidence_X = 1 / (1 + np.exp(-np.abs(margin_X)))
  bins = bin_counts(confidence_X, hit_X, np.ones(len(margin_X), bool), _BINS)
  whole = [np.ones(len(margin_X)), hit_X, margin_X, confidence_X]
  return np.concatenate([np.stack(whole, 1), bins.reshape(len(margin_X), -1)], axis=1)


def _figures(sums_F):
  """accuracy, margin and overconfidence [..., 3] of sums [..., F]; NaN of no pair."""
  with np.errstate(invalid="ignore", divide="ignore"):
    hit, margin, confidence = (sums_F[..., i] / sums_F[..., 0] for i in (1, 2, 3))
  return np.stack([hit, margin, confidence - hit], -1)


def _resampled(sums_CGF, samples, seed):
  """Figures [S, G, 3] of posts that are drawn with replacement."""
  rng, posts = np.random.default_rng(seed), len(sums_CGF)
  drawn = []
  for start in range(0, samples, 100):  # no more are ever laid out
    size = min(100, samples - start)
    drawn_SC = rng.multinomial(posts, np.full(posts, 1 / posts), size=size)
    drawn.append(_figures(np.tensordot(drawn_SC, sums_CGF[..., :4], 1)))
  return np.concatenate(drawn)


def _told(figures_M, figures_SM, told) -> dict:
  row = {}
  for m, name in enumerate(FIGURES):
    value, low, high = None, None, None
    if name in told:
      value = float(figures_M[m])
      # A sample that happens to have nobody of a group says nothing of it.
      low, high = map(float, np.nanpercentile(figures_SM[:, m], [2.5, 97.5]))
    row |= {name: value, f"{name}_low": low, f"{name}_high": high}
  return row
