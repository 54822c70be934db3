"""How much of a withheld age or gender a preference distribution P̃ gives away.

A ridge logistic regression predicts the group from P̃, cross-validated by user: what it predicts
is of users that it was not fitted on. Axes: X users, P dimensions, K directions, F features,
G groups, S bootstrap samples.
"""

from collections.abc import Sequence

import numpy as np
from scipy.optimize import minimize
from scipy.special import log_softmax, softmax
from scipy.stats import rankdata

from alignx_jax.data.records import Example
from alignx_jax.evaluation.bias import LEAST_PAIRS
from alignx_jax.personas.demographics import NOT_STATED

FOLDS = 5


def users_of(examples: Sequence[Example]) -> list[str]:
  """What tells the users of examples apart: what they wrote, chose and said of themselves."""
  return [
    repr(
      (
        [(item.post, item.comment) for item in example.persona.comments],
        [(item.post, item.chosen, item.rejected) for item in example.persona.pairs],
        example.persona.description,
      )
    )
    for example in examples
  ]


def leakage_row(
  probabilities_XPK: np.ndarray,
  groups: Sequence[str],
  users: Sequence[str],
  *,
  samples: int = 500,
  seed: int = 0,
) -> dict:
  """How well P̃ predicts a group, beside always saying the most common one.

  Users whose group is not stated, of whom there is no P̃ (NaN), or whose group has fewer than 30
  users, are left out.

  Args:
    groups, users: of each P̃; users share a fold with themselves.
  Returns:
    "groups", {group: users} of those that count; "examples"; "enough"; with their 95 % intervals
    by bootstrap over users: "auc", the mean over groups of one against the rest, 0.5 by chance;
    "accuracy"; "gain", over "majority", the accuracy of the most common group. None where fewer
    than two groups have enough users.
  """
  groups, users = np.asarray(groups, object), np.asarray(users, object).astype(str)
  known_X = (groups != NOT_STATED) & np.isfinite(probabilities_XPK).all(axis=(1, 2))
  sizes = {name: len(set(users[known_X & (groups == name)])) for name in sorted(set(groups))}
  sizes = {name: size for name, size in sizes.items() if size >= LEAST_PAIRS}
  kept_X = known_X & np.isin(groups, list(sizes))
  row = {"groups": sizes, "examples": int(kept_X.sum()), "enough": len(sizes) >= 2}
  names = ("auc", "accuracy", "gain")
  if not row["enough"]:
    empty = dict.fromkeys(f"{name}{end}" for name in names for end in ("", "_low", "_high"))
    return row | empty | {"majority": None}
  features_XF = np.asarray(probabilities_XPK[kept_X][..., [0, 2]], np.float64)
  features_XF = features_XF.reshape(len(features_XF), -1)
  label_X = np.searchsorted(list(sizes), groups[kept_X].astype(str))
  _, user_X = np.unique(users[kept_X], return_inverse=True)
  predicted_XG, common_X = out_of_fold(features_XF, label_X, user_X, seed=seed)

  def figures(of):
    hit_X = predicted_XG[of].argmax(-1) == label_X[of]
    gain_X = hit_X.astype(float) - (common_X[of] == label_X[of])
    return macro_auc(predicted_XG[of], label_X[of]), hit_X.mean(), gain_X.mean()

  rng, members = np.random.default_rng(seed), _members(user_X)
  drawn = [
    np.concatenate([members[u] for u in rng.integers(len(members), size=len(members))])
    for _ in range(samples)
  ]
  low, high = np.nanpercentile([figures(of) for of in drawn], [2.5, 97.5], axis=0)
  for i, (name, value) in enumerate(zip(names, figures(np.arange(len(label_X))), strict=True)):
    row |= {name: float(value), f"{name}_low": float(low[i]), f"{name}_high": float(high[i])}
  return row | {"majority": float((common_X == label_X).mean())}


def out_of_fold(features_XF, label_X, user_X, *, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
  """Probabilities [X, G] of each label by a fit to other users, and their most common label [X].

  Users are dealt to FOLDS folds, those of each label evenly.
  """
  rng = np.random.default_rng(seed)
  first_U = np.array([label_X[of[0]] for of in _members(user_X)])
  fold_U = np.empty(len(first_U), int)
  order_U = rng.permutation(len(first_U))
  order_U = order_U[np.argsort(first_U[order_U], kind="stable")]
  fold_U[order_U] = np.arange(len(first_U)) % FOLDS
  fold_X = fold_U[user_X]
  predicted_XG, common_X = np.empty((len(label_X), label_X.max() + 1)), np.empty_like(label_X)
  for fold in range(FOLDS):
    held_X = fold_X == fold
    mean_F, spread_F = features_XF[~held_X].mean(0), features_XF[~held_X].std(0)
    scaled_XF = (features_XF - mean_F) / np.where(spread_F > 1e-9, spread_F, np.inf)
    weights_GF, bias_G = fit_logistic(scaled_XF[~held_X], label_X[~held_X])
    predicted_XG[held_X] = softmax(scaled_XF[held_X] @ weights_GF.T + bias_G, axis=-1)
    common_X[held_X] = np.bincount(label_X[~held_X]).argmax()
  return predicted_XG, common_X


def fit_logistic(features_XF, label_X, *, penalty: float | None = None):
  """Multinomial logistic regression: least Σ −log p(label) + penalty / 2 · Σ weights².

  Args:
    label_X: 0 … G − 1, each of them there.
    penalty: of the weights, not of the biases. None: F, the prior under which the log-odds of a
      user of F standardised features spread by 1.
  Returns:
    weights [G, F] and biases [G], whose sums over G are 0.
  """
  penalty = features_XF.shape[1] if penalty is None else penalty
  design_XF = np.concatenate([features_XF, np.ones((len(features_XF), 1))], axis=1)
  one_hot_XG = np.eye(label_X.max() + 1)[label_X]
  shape = one_hot_XG.shape[1], design_XF.shape[1]

  def loss(flat):
    weights_GF = flat.reshape(shape)
    log_p_XG = log_softmax(design_XF @ weights_GF.T, axis=-1)
    penalised_GF = np.concatenate([weights_GF[:, :-1], np.zeros((shape[0], 1))], axis=1)
    value = -(one_hot_XG * log_p_XG).sum() + penalty / 2 * (penalised_GF**2).sum()
    gradient_GF = (np.exp(log_p_XG) - one_hot_XG).T @ design_XF + penalty * penalised_GF
    return value, gradient_GF.ravel()

  options = {"maxiter": 2000, "ftol": 1e-12, "gtol": 1e-6}
  found = minimize(loss, np.zeros(shape).ravel(), jac=True, method="L-BFGS-B", options=options)
  weights_GF = found.x.reshape(shape)
  weights_GF = weights_GF - weights_GF.mean(axis=0)
  return weights_GF[:, :-1], weights_GF[:, -1]


def macro_auc(score_XG, label_X) -> float:
  """Area under the ROC curve of each label against the rest, mean over labels; ties are halves.

  NaN where only one label is there.
  """
  areas = []
  for g in range(score_XG.shape[1]):
    is_X = label_X == g
    yes, no = is_X.sum(), (~is_X).sum()
    if yes and no:
      ranks = rankdata(score_XG[:, g])[is_X].sum()
      areas.append((ranks - yes * (yes + 1) / 2) / (yes * no))
  return float(np.mean(areas)) if areas else float("nan")


def _members(user_X):
  """Indices of each user's entries."""
  order_X = np.argsort(user_X, kind="stable")
  return np.split(order_X, np.flatnonzero(np.diff(user_X[order_X])) + 1)
