"""What a win rate would be if both responses were equally long.

Dubois et al. 2024 (arXiv 2404.04475, eq. 2): the preference of the first response is regressed on
which model it is by and on the difference of lengths,

  q = σ(θ + φ · tanh(Δ / std Δ)),    Δ = length of the first − length of the second,

and told at Δ = 0: σ(θ). Their third term, how difficult an instruction is, is shared by many models
that answer the same ones; two sets of responses cannot tell it from θ, so there is none.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

PRIOR = 10.0  # standard deviation of θ and φ; keeps them finite where lengths decide everything
_SAMPLES, _AT_ONCE = 2000, 2_000_000


class LengthControl(NamedTuple):
  """A length-controlled win rate with its 95 % interval; shares, 0 to 1.

  Attributes:
    model_term: θ, log-odds at equal length.
    length_term: φ; above 0 where the longer response is preferred.
    longer: share of pairs in which the first response is longer, ties half.
    remark: why the win rate is to be doubted, or None if it cannot be told; "" for nothing.
  """

  win_rate: float | None
  low: float | None
  high: float | None
  model_term: float | None
  length_term: float | None
  longer: float
  remark: str = ""


def length_controlled(
  outcome_X: np.ndarray, difference_X: np.ndarray, groups: Sequence, *, seed: int = 0
) -> LengthControl:
  """The win rate of the first responses at equal length.

  Args:
    outcome_X: preference for the first response, 0 … 1.
    difference_X: length of the first response less that of the second.
    groups: each pair's user; whole users are resampled for the interval, as in
      accuracy.bootstrap_interval.
  """
  outcome_X, difference_X = np.asarray(outcome_X, float), np.asarray(difference_X, float)
  longer = float((np.sign(difference_X).mean() + 1) / 2)
  spread = difference_X.std()
  if not spread and difference_X.any():
    remark = "every first response is longer by the same, so length cannot be told from the model"
    return LengthControl(None, None, None, None, None, longer, remark)
  remark = ""
  if (difference_X > 0).all() or (difference_X < 0).all():
    remark = "no two lengths are equal or the other way round: the figure is extrapolated"
  feature_X = np.tanh(difference_X / spread) if spread else np.zeros_like(difference_X)
  beta_2 = fit(outcome_X, feature_X, np.ones((1, len(outcome_X))))[0]
  _, member_X = np.unique(np.asarray(groups, object).astype(str), return_inverse=True)
  users = member_X.max() + 1
  drawn = np.random.default_rng(seed).integers(users, size=(_SAMPLES, users))
  rates = []
  step = max(1, _AT_ONCE // len(outcome_X))
  for start in range(0, _SAMPLES, step):
    times = [np.bincount(row, minlength=users) for row in drawn[start : start + step]]
    weight_SX = np.stack(times)[:, member_X].astype(float)
    rates.append(_sigmoid(fit(outcome_X, feature_X, weight_SX, start_2=beta_2)[:, 0]))
  low, high = np.percentile(np.concatenate(rates), [2.5, 97.5])
  rate = float(_sigmoid(beta_2[0]))
  return LengthControl(rate, float(low), float(high), *beta_2.tolist(), longer, remark)


def fit(
  outcome_X: np.ndarray, feature_X: np.ndarray, weight_SX: np.ndarray, *, start_2=(0.0, 0.0)
) -> np.ndarray:
  """θ and φ [S, 2] of greatest posterior probability, for each set of weights.

  Maximises Σ w [y log q + (1 − y) log(1 − q)] − (θ² + φ²) / (2 PRIOR²), which is strictly concave,
  by Newton's method; steps are halved while they lead down.

  Args:
    outcome_X: y, 0 … 1.
    feature_X: tanh of the standardised difference.
    weight_SX: how often each pair counts.
    start_2: where to look first.
  """
  design_X2 = np.stack([np.ones_like(feature_X), feature_X], axis=1)
  precision = 1 / PRIOR**2

  def objective(beta_S2):
    logit_SX = beta_S2 @ design_X2.T
    log_SX = outcome_X * logit_SX - np.logaddexp(0, logit_SX)
    return (weight_SX * log_SX).sum(axis=1) - precision / 2 * (beta_S2**2).sum(axis=1)

  beta_S2 = np.tile(np.asarray(start_2, float), (len(weight_SX), 1))
  value_S = objective(beta_S2)
  for _ in range(100):
    q_SX = _sigmoid(beta_S2 @ design_X2.T)
    slope_S2 = (weight_SX * (outcome_X - q_SX)) @ design_X2 - precision * beta_S2
    if np.abs(slope_S2).max() < 1e-8 * max(1.0, len(outcome_X)):
      break
    curve_SX = weight_SX * q_SX * (1 - q_SX)
    hessian_S22 = np.einsum("sx,xi,xj->sij", curve_SX, design_X2, design_X2, optimize=True)
    step_S2 = np.linalg.solve(hessian_S22 + precision * np.eye(2), slope_S2[..., None])[..., 0]
    for _ in range(30):
      next_S = objective(beta_S2 + step_S2)
      worse_S = next_S < value_S - 1e-9 * np.abs(value_S)
      if not worse_S.any():
        break
      step_S2[worse_S] /= 2
    beta_S2, value_S = beta_S2 + step_S2, next_S
  return beta_S2


def _sigmoid(x):
  return np.exp(-np.logaddexp(0, -x))
