"""How well an inferred P̃ agrees with the labels: macro-F1, calibration, temperature.

Axes: X users, P dimensions, K = 3 directions in the order negative, neutral, positive, Q = 2
poles, M labelled entries. Probabilities are [X, P, K]. Labels are directions [X, P]: 0, 0.5, 1,
or NaN where nothing is known, which is left out everywhere.

Every measure is a function of counts that add over users, so it is computed from counts with
first axis X: summed over it for the figure, resampled along it for the interval. NumPy only.
"""

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from alignx_jax.evaluation.results import EMPTY, interval, markdown
from alignx_jax.personas.preferences import NEUTRAL, PreferenceSpace

DIRECTIONS_K = np.array([0.0, NEUTRAL, 1.0])
POLES_Q = np.array([0, 2])  # Indices into K.
AT_LEAST = 0.05  # A pole less probable than this counts as not stated.
# The figures of a result, each with its interval.
SHARES = (
  *("macro_f1", "low", "high"),
  *("ece", "ece_low", "ece_high", "ece_chance"),
  *("ece_poles", "ece_poles_low", "ece_poles_high", "ece_poles_chance"),
)


def softmax(logits_XPK, temperature: float = 1.0) -> np.ndarray:
  """softmax(logits / temperature) over the last axis, in float64; large logits do not overflow.

  Raises:
    ValueError: the temperature is not above 0.
  """
  if not temperature > 0:
    raise ValueError(f"A temperature of {temperature}: give a number above 0.")
  logits_XPK = np.asarray(logits_XPK, np.float64)
  exponentials = np.exp((logits_XPK - logits_XPK.max(-1, keepdims=True)) / temperature)
  return exponentials / exponentials.sum(-1, keepdims=True)


def fit_temperature(logits_XPK, directions_XP) -> float:
  """The T that minimises the mean negative log-likelihood of softmax(logits / T).

  Temperature scaling (Guo et al. 2017, section 4.2). The loss is convex in 1/T, so it has one
  valley along log T, which golden-section search narrows to 1e-5, within 0.05 … 20. Logits
  that are always right want a T below that, logits that are no better than chance one above:
  they get about the bound. T keeps the most probable direction, hence macro-F1. Fit it on
  other users than those measured.

  Args:
    logits_XPK: in nats, unnormalised.
  Returns:
    T; 1 where no other T is better.
  Raises:
    ValueError: no entry is labelled, a shape does not match, or a labelled logit is not finite.
  """
  logits_XPK, label_XP = np.asarray(logits_XPK, np.float64), _classes(directions_XP)
  _check_shape(logits_XPK, label_XP)
  logits_MK, label_M = logits_XPK[label_XP >= 0], label_XP[label_XP >= 0]
  if not len(label_M):
    raise ValueError("No entry is labelled, so there is nothing to fit a temperature to.")
  if not np.isfinite(logits_MK).all():
    raise ValueError("A labelled entry has a logit that is NaN or infinite.")
  # Distances below the largest logit: the log-sum-exp needs no other care.
  below_MK = logits_MK - logits_MK.max(-1, keepdims=True)
  target_M = np.take_along_axis(below_MK, label_M[:, None], -1)[:, 0]

  def loss(log_temperature):
    inverse = np.exp(-log_temperature)
    return np.mean(np.log(np.exp(inverse * below_MK).sum(-1)) - inverse * target_M)

  low, high = np.log(0.05), np.log(20.0)
  golden = (np.sqrt(5) - 1) / 2
  left, right = high - golden * (high - low), low + golden * (high - low)
  loss_left, loss_right = loss(left), loss(right)
  while high - low > 1e-5:
    if loss_left < loss_right:
      high, right, loss_right = right, left, loss_left
      left = high - golden * (high - low)
      loss_left = loss(left)
    else:
      low, left, loss_left = left, right, loss_right
      right = low + golden * (high - low)
      loss_right = loss(right)
  best = (low + high) / 2
  return float(np.exp(best)) if loss(best) < loss(0.0) else 1.0


def most_probable(probabilities_XPK) -> np.ndarray:
  """The most probable direction [X, P]; of equals neutral, else negative."""
  neutral_first = np.asarray(probabilities_XPK)[..., [1, 0, 2]]
  return DIRECTIONS_K[[1, 0, 2]][neutral_first.argmax(-1)]


def frequencies(directions_XP) -> np.ndarray:
  """How often each direction is each dimension's label, [P, K]; neutral where none is known.

  Of the training users, this is the P̃ of somebody of whom nothing is known.
  """
  label_XP = _classes(directions_XP)
  count_PK = (label_XP[..., None] == np.arange(3)).sum(0).astype(np.float64)
  count_PK[count_PK.sum(-1) == 0, 1] = 1
  return count_PK / count_PK.sum(-1, keepdims=True)


def majority(directions_XP) -> np.ndarray:
  """Each dimension's most common direction, [P]; of equals neutral, else negative."""
  return most_probable(frequencies(directions_XP))


def macro_f1(predicted_XP, directions_XP) -> float:
  """Mean over the three directions of F1 pooled over users and dimensions.

  F1 = 2 · hits / (predicted + labelled), counted over all labelled entries. A direction that
  is neither predicted nor labelled counts as 0, as in scikit-learn's
  `f1_score(..., labels=[0, 0.5, 1], average="macro", zero_division=0)` on the flat entries:
  low, but comparable.

  Args:
    predicted_XP: a direction for every labelled entry; [P] says the same of every user.
  Returns:
    0 … 1; NaN if no entry is labelled.
  Raises:
    ValueError: see `f1_counts`.
  """
  return float(_macro_f1(f1_counts(predicted_XP, directions_XP).sum(0)))


def f1_counts(predicted_XP, directions_XP) -> np.ndarray:
  """Counts of each user, [X, K, 3]: hits, predicted, labelled.

  Raises:
    ValueError: a shape does not match, a value is no direction, or a labelled entry has no
      prediction.
  """
  label_XP, predicted_XP = _classes(directions_XP), _classes(predicted_XP)
  if predicted_XP.shape not in (label_XP.shape, label_XP.shape[1:]):
    raise ValueError(f"Predictions {predicted_XP.shape} for labels {label_XP.shape}.")
  predicted_XP = np.broadcast_to(predicted_XP, label_XP.shape)
  known_XP = label_XP >= 0
  if (predicted_XP[known_XP] < 0).any():
    raise ValueError("A labelled entry has no prediction: make its label NaN to leave it out.")
  predicted_XPK = (predicted_XP[..., None] == np.arange(3)) & known_XP[..., None]
  labelled_XPK = label_XP[..., None] == np.arange(3)
  counts = (predicted_XPK & labelled_XPK, predicted_XPK, labelled_XPK)
  return np.stack([count_XPK.sum(1) for count_XPK in counts], -1)


def expected_calibration_error(probabilities_XPK, directions_XP, bins: int = 15) -> float:
  """`ece`: confidence of the most probable direction against its accuracy.

  Guo et al. 2017, eq. 3: Σ_b n_b/n |accuracy_b − confidence_b| over equal bins of confidence.
  Most dimensions are neutral for most users, and saying so with confidence is easy, so over
  all dimensions this flatters: read it beside `pole_calibration_error`.

  Returns:
    0 … 1; NaN if no entry is labelled.
  Raises:
    ValueError: see `confidence_counts`.
  """
  return float(calibration_error(confidence_counts(probabilities_XPK, directions_XP, bins).sum(0)))


def pole_calibration_error(
  probabilities_XPK, directions_XP, bins: int = 15, *, at_least: float = AT_LEAST
) -> float:
  """`ece_poles`: probability of each pole against how often the label is that pole.

  The same sum as `expected_calibration_error`, one-vs-rest over the two poles of each
  dimension, and only those the model states with `at_least` this probability: what it says of
  a user, without the many poles it rightly leaves alone. A preference that it gives less is
  not seen here, but costs macro-F1.

  Returns:
    0 … 1; NaN if no pole of a labelled entry is that probable.
  Raises:
    ValueError: see `confidence_counts`.
  """
  counts = pole_counts(probabilities_XPK, directions_XP, bins, at_least=at_least)
  return float(calibration_error(counts.sum(0)))


def reliability(
  probabilities_XPK,
  directions_XP,
  bins: int = 10,
  *,
  dimensions: Sequence[int] | None = None,
  at_least: float = AT_LEAST,
) -> list[dict]:
  """The bins behind `pole_calibration_error`, for a reliability diagram.

  Args:
    dimensions: indices to look at, such as those of one group; all if None.
  Returns:
    For each bin that holds something, lowest first: "predicted", the mean probability,
    "observed", the share whose label is that pole, and "count".
  Raises:
    ValueError: see `confidence_counts`.
  """
  if dimensions is not None:
    probabilities_XPK = np.asarray(probabilities_XPK)[:, list(dimensions)]
    directions_XP = np.asarray(directions_XP)[:, list(dimensions)]
  counts = pole_counts(probabilities_XPK, directions_XP, bins, at_least=at_least).sum(0)
  return [
    {"predicted": float(total / n), "observed": float(hits / n), "count": int(n)}
    for n, total, hits, _ in counts
    if n
  ]


def confidence_counts(probabilities_XPK, directions_XP, bins: int) -> np.ndarray:
  """Sums behind `ece`, [X, bins, 4]: entries, confidences p, hits, variances p(1 − p).

  Raises:
    ValueError: a shape does not match, a label is no direction, or the probabilities of a
      labelled entry are not a distribution.
  """
  probabilities_XPK, label_XP = _checked(probabilities_XPK, directions_XP)
  said_XP = _classes(most_probable(probabilities_XPK))
  confidence_XP = probabilities_XPK.max(-1)
  return bin_counts(confidence_XP, said_XP == label_XP, label_XP >= 0, bins)


def pole_counts(
  probabilities_XPK, directions_XP, bins: int, *, at_least: float = AT_LEAST
) -> np.ndarray:
  """Sums behind `ece_poles`, [X, bins, 4]: poles, probabilities p, hits, variances p(1 − p).

  Raises:
    ValueError: see `confidence_counts`.
  """
  probabilities_XPK, label_XP = _checked(probabilities_XPK, directions_XP)
  poles_XPQ = probabilities_XPK[..., POLES_Q]
  hits_XPQ = label_XP[..., None] == POLES_Q
  counted_XPQ = (label_XP >= 0)[..., None] & (poles_XPQ >= at_least)
  return bin_counts(poles_XPQ, hits_XPQ, counted_XPQ, bins)


def bootstrap_users(
  measure: Callable[[np.ndarray], np.ndarray],
  counts: np.ndarray,
  *,
  samples: int = 500,
  seed: int = 0,
) -> tuple[float, float]:
  """95 % percentile interval of a measure, resampling whole users with replacement.

  A user's dimensions are not independent, so users are drawn, not entries; those of whom
  nothing is counted are left out. The same seed draws the same users for every predictor.
  A calibration error adds up absolute gaps, which resampling can only roughen: of few users
  or of a nearly perfect model its interval lies high, even above the figure itself.

  Args:
    measure: counts summed over users, [samples, …], to figures [samples].
    counts: of each user, first axis X.
  Returns:
    Low and high; NaN, NaN if nothing is counted.
  """
  counts = counts[counts.any(axis=tuple(range(1, counts.ndim)))]
  users = len(counts)
  if not users:
    return float("nan"), float("nan")
  # How often each user is drawn, times their counts: no sample is ever laid out user by user.
  drawn = np.random.default_rng(seed).multinomial(users, np.full(users, 1 / users), size=samples)
  low, high = np.percentile(measure(np.tensordot(drawn, counts, 1)), [2.5, 97.5])
  return float(low), float(high)


def preference_results(
  predictors: Mapping[str, np.ndarray],
  directions_XP,
  *,
  bins: int = 15,
  samples: int = 500,
  seed: int = 0,
) -> list[dict]:
  """Macro-F1 and calibration of each predictor on the same users.

  Args:
    predictors: by name, probabilities [X, P, K], or directions [X, P] or [P] (all users alike).
    bins: of the calibration errors.
    samples: of the bootstrap over users.
  Returns:
    A row each: "predictor"; "macro_f1" with its 95 % interval "low" to "high"; "ece" with
    "ece_low", "ece_high" and "ece_chance", about what a perfectly calibrated model would show
    with as many labels, independent ones; the same for "ece_poles"; "users", how many have a
    label; "labels", how many entries. A calibration error is None for directions, and where
    nothing is counted.
  Raises:
    ValueError: no entry is labelled, or a predictor does not fit; the message names it. A user
      of whom some predictor says nothing (NaN) must be left out for all: make the labels NaN.
  """
  if not np.isfinite(np.asarray(directions_XP, np.float64)).any():
    raise ValueError("No entry is labelled, so there is nothing to measure.")
  return _rows(predictors, directions_XP, bins, samples, seed)


def group_results(
  space: PreferenceSpace,
  predictors: Mapping[str, np.ndarray],
  directions_XP,
  *,
  bins: int = 15,
  samples: int = 500,
  seed: int = 0,
) -> list[dict]:
  """`preference_results` within each of the space's groups of dimensions.

  A group has fewer labels than the whole, so more of its calibration error is chance: read
  it beside "ece_chance". It may have no label of some direction, which then counts as 0 in its
  macro-F1 (see `macro_f1`).

  Returns:
    The rows of each group in turn, with "group"; None throughout where a group has no label.
  Raises:
    ValueError: a predictor does not fit; the message names it.
  """
  directions_XP = np.asarray(directions_XP, np.float64)
  rows = []
  for group, dimensions in space.groups.items():
    part = {}
    for name, predicted in predictors.items():
      predicted = np.asarray(predicted)
      part[name] = predicted[dimensions] if predicted.ndim == 1 else predicted[:, dimensions]
    found = _rows(part, directions_XP[:, dimensions], bins, samples, seed)
    rows += [{"group": group} | row for row in found]
  return rows


def format_preference_table(rows: Sequence[Mapping]) -> str:
  """The rows, in the order given, as a Markdown table that also reads well in a terminal.

  Behind a calibration error, in parentheses, what chance alone would make of it.

  Raises:
    ValueError: a row lacks a key, or a share is not within 0 to 1.
  """
  if not rows:
    return EMPTY
  names = ["group", "predictor"] if "group" in rows[0] else ["predictor"]
  _check_rows(rows, (*names, "users", "labels"))
  headings = ("macro-F1 % [95 % CI]", "ECE % (chance)", "pole ECE % (chance)", "users", "labels")
  columns = (*names, *headings)
  share = lambda value: f"{100 * value:.1f}"

  def error(row, key):
    chance = row.get(f"{key}_chance")
    if row[key] is None:
      return "–"
    return share(row[key]) if chance is None else f"{share(row[key])} ({share(chance)})"

  cells = [
    (
      *(row[key] for key in names),
      "–" if row["macro_f1"] is None else f"{share(row['macro_f1'])} {interval(row)}",
      error(row, "ece"),
      error(row, "ece_poles"),
      str(row["users"]),
      str(row["labels"]),
    )
    for row in rows
  ]
  # The interval reads from the left, as in results.format_table.
  return markdown(columns, cells, left=len(names) + 1)


def _rows(predictors, directions_XP, bins, samples, seed):
  known_XP = _classes(directions_XP) >= 0
  size = {"users": int(known_XP.any(1).sum()), "labels": int(known_XP.sum())}
  rows = []
  for name, predicted in predictors.items():
    try:
      counts = _counts(np.asarray(predicted), directions_XP, bins)
    except ValueError as error:
      raise ValueError(f"{name}: {error}") from None
    row = {"predictor": name} | dict.fromkeys(SHARES)
    for key, each in counts.items():
      measure = _macro_f1 if key == "macro_f1" else calibration_error
      ends = ("low", "high") if key == "macro_f1" else (f"{key}_low", f"{key}_high")
      row[key] = float(measure(each.sum(0)))
      row |= zip(ends, bootstrap_users(measure, each, samples=samples, seed=seed), strict=True)
      if key != "macro_f1":
        row[f"{key}_chance"] = float(chance_calibration_error(each.sum(0)))
    # JSON has no NaN.
    row = {key: None if value != value else value for key, value in row.items()}
    rows.append(row | size)
  return rows


def _counts(predicted, directions_XP, bins):
  """Counts behind each figure that a prediction has."""
  if predicted.ndim < 3:
    return {"macro_f1": f1_counts(predicted, directions_XP)}
  return {
    "ece": confidence_counts(predicted, directions_XP, bins),
    "ece_poles": pole_counts(predicted, directions_XP, bins),
    "macro_f1": f1_counts(most_probable(predicted), directions_XP),
  }


def _check_rows(rows, others):
  shares = ("macro_f1", "low", "high", "ece", "ece_poles")
  for i, row in enumerate(rows):
    for key in (*shares, *others):
      if key not in row:
        raise ValueError(f"rows[{i}] has no {key!r}: it has {sorted(row)}")
    for key in shares:
      if row[key] is not None and not 0 <= row[key] <= 1:  # NaN fails too
        raise ValueError(f"rows[{i}][{key!r}] is {row[key]}: give a share, from 0 to 1")


def _classes(directions_XP):
  """Index into K of each direction; -1 where it is NaN."""
  directions_XP = np.asarray(directions_XP, np.float64)
  known_XP = ~np.isnan(directions_XP)
  wrong = directions_XP[known_XP & ~np.isin(directions_XP, DIRECTIONS_K)]
  if wrong.size:
    raise ValueError(f"{wrong[0]} is no direction: give 0, 0.5, 1, or NaN where unknown.")
  return np.where(known_XP, 2 * directions_XP, -1).astype(int)


def _check_shape(values_XPK, label_XP):
  if label_XP.ndim != 2 or values_XPK.shape != (*label_XP.shape, 3):
    raise ValueError(f"Shape {values_XPK.shape} for labels {label_XP.shape}: give [X, P, 3].")


def _checked(probabilities_XPK, directions_XP):
  """The probabilities in float64, and the labels as indices into K."""
  probabilities_XPK, label_XP = np.asarray(probabilities_XPK, np.float64), _classes(directions_XP)
  _check_shape(probabilities_XPK, label_XP)
  probabilities_MK = probabilities_XPK[label_XP >= 0]
  if np.isnan(probabilities_MK).any():
    raise ValueError("A labelled entry has no probabilities: make its label NaN to leave it out.")
  # A bfloat16 softmax adds up to 1 only to about a hundredth.
  whole_M = np.abs(probabilities_MK.sum(-1) - 1) < 0.02
  if not (whole_M & (probabilities_MK >= 0).all(-1) & (probabilities_MK <= 1.01).all(-1)).all():
    raise ValueError("The probabilities of a labelled entry do not add up to 1; are they logits?")
  return probabilities_XPK.clip(0, 1), label_XP


def bin_counts(values, hits, counted, bins):
  """[X, bins, 4]: entries, and sums of values p, hits and p(1 − p); a bin is (low, high]."""
  users, user = len(values), np.nonzero(counted)[0]
  values, hits = values[counted], hits[counted]
  slot = user * bins + np.digitize(values, np.linspace(0, 1, bins + 1)[1:-1], right=True)
  sums = [
    np.bincount(slot, weights=weights, minlength=users * bins)
    for weights in (None, values, hits, values * (1 - values))
  ]
  return np.stack(sums, -1).reshape(users, bins, 4)


def calibration_error(sums):
  """Calibration error of sums [..., bins, 4]; n_b/n · |mean − mean| is |sum − sum| / n."""
  count, value, hits, _ = np.moveaxis(sums, -1, 0)
  with np.errstate(invalid="ignore"):
    return np.abs(hits - value).sum(-1) / count.sum(-1)


def chance_calibration_error(sums):
  """What `calibration_error` expects of a perfect model: √(2/π) · each bin's deviation.

  That is the mean of |normal|.
  """
  count, _, _, variance = np.moveaxis(sums, -1, 0)
  with np.errstate(invalid="ignore"):
    return np.sqrt(2 / np.pi * variance).sum(-1) / count.sum(-1)


def _macro_f1(sums):
  """Macro-F1 of counts [..., K, 3]."""
  hits, predicted, labelled = np.moveaxis(sums, -1, 0)
  f1 = 2 * hits / np.maximum(predicted + labelled, 1)
  return np.where(labelled.sum(-1) > 0, f1.mean(-1), np.nan)
