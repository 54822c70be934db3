"""Alignment accuracy with its controls.

A pair counts when log π/π_ref of the chosen response is above that of the rejected one,
strictly. Three protocols differ in the prompt on which the reference is scored:

  matched        the policy's own prompt, as the DPO equation says
  release        the raw-persona prompt, as the AlignX release does even for PBA
  unconditioned  no persona; the only fair one for an untrained model, whose matched
                 log-ratio is zero
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence

import numpy as np
from absl import logging

from alignx_jax.data.formatting import Formatting, Refused
from alignx_jax.data.loader import Loader
from alignx_jax.data.proposals import fit_context
from alignx_jax.data.records import Example
from alignx_jax.data.rows import Rows
from alignx_jax.personas.persona import HistoryPolicy
from alignx_jax.training.reference import score_stream

PROTOCOLS = ("matched", "release", "unconditioned")
CONDITIONS = {
  "ica": ("persona", "shuffled", "none"),
  "pba": ("inferred", "golden", "shuffled", "none"),
  "pba_by_head": ("profile", "golden", "shuffled", "none"),
  "pba_head": ("inferred", "golden", "shuffled", "none"),
  "dpo": ("none",),
  "vpl": ("inferred", "shuffled", "none"),
}


def bootstrap_interval(
  correct: np.ndarray, groups: Sequence, *, samples: int = 2000, seed: int = 0
) -> tuple[float, float]:
  """95 % percentile interval of the mean, resampling whole groups with replacement.

  Pairs of one post are not independent: a benchmark may hold the same two responses many
  times, with other histories. Resampling posts says how much another choice of posts
  could have changed the figure.

  Args:
    correct: each pair's outcome, 0 … 1.
    groups: each pair's group, its post.
  """
  _, member = np.unique(np.asarray(groups, object).astype(str), return_inverse=True)
  total = np.bincount(member, weights=correct)
  size = np.bincount(member)
  drawn = np.random.default_rng(seed).integers(len(size), size=(samples, len(size)))
  means = total[drawn].sum(axis=1) / size[drawn].sum(axis=1)
  low, high = np.percentile(means, [2.5, 97.5])
  return float(low), float(high)


def result(
  policy: str, condition: str, protocol: str, examples: Sequence[Example], correct: np.ndarray
) -> dict:
  """One row of results.json.

  Args:
    examples: the test pairs.
    correct: each pair's outcome, 0 … 1; NaN where it could not be scored. Those are left
      out and counted as `refused`.
  Raises:
    ValueError: there is no pair to score.
  """
  scored = np.flatnonzero(np.isfinite(correct))
  if not len(scored):
    raise ValueError(f"None of the {len(correct)} test pairs could be scored for {policy}.")
  posts = [examples[i].post for i in scored]
  low, high = bootstrap_interval(correct[scored], posts)
  return {
    "policy": policy,
    "condition": condition,
    "protocol": protocol,
    "accuracy": float(correct[scored].mean()),
    "low": low,
    "high": high,
    "examples": len(scored),
    "posts": len(set(posts)),
    "refused": len(correct) - len(scored),
  }


def length_control(examples: Sequence[Example]) -> dict:
  """'The longer response wins', in characters; a tie counts as a half, as a coin would."""
  longer = [np.sign(len(e.chosen) - len(e.rejected)) for e in examples]
  return result("length", "length", "none", examples, (np.asarray(longer) + 1) / 2)


def others(size: int, *, seed: int = 0) -> np.ndarray:
  """For each of so many examples the index of another one.

  Raises:
    ValueError: there is no other one.
  """
  if size < 2:
    raise ValueError("One test pair cannot be given another user's persona; use two or more.")
  order = np.random.default_rng(seed).permutation(size)
  other = np.empty_like(order)
  other[order] = np.roll(order, 1)  # one cycle through all: nobody keeps their own
  return other


def shuffled(examples: Sequence[Example], *, seed: int = 0) -> list[Example]:
  """Each example with the persona, profile and labels of another one.

  Raises:
    ValueError: there is no other one.
  """
  other = others(len(examples), seed=seed)
  return [
    dataclasses.replace(
      example,
      persona=examples[i].persona,
      profile=examples[i].profile,
      directions=examples[i].directions,
    )
    for example, i in zip(examples, other, strict=True)
  ]


@dataclasses.dataclass
class Scorer:
  """Scores of one model on one set of pairs under any condition, each computed once.

  Attributes:
    name: of the model, for progress bars.
    log_probs: Rows to response log-probs [B, E, N].
    formatting: its condition and history are replaced as needed.
  """

  name: str
  log_probs: Callable[[Rows], np.ndarray]
  examples: Sequence[Example]
  formatting: Formatting
  rows: int

  def __post_init__(self):
    self.score = functools.cache(self._score)
    self._loader = functools.cache(self._loader)

  def _score(
    self, condition: str, shuffle: bool = False, history: HistoryPolicy = HistoryPolicy()
  ) -> np.ndarray:
    label = f"{self.name}: {'shuffled ' if shuffle else ''}{condition}"
    return score_stream(self.log_probs, self._loader(condition, shuffle, history), describe=label)

  def _loader(self, condition, shuffle=False, history=HistoryPolicy()):
    examples = shuffled(self.examples) if shuffle else self.examples
    formatting = dataclasses.replace(self.formatting, condition=condition, history=history)
    return fit_context(Loader(examples, formatting, rows=self.rows))

  def unscored(self, *key) -> dict[int, str]:
    """Index of each example that `score` of the same arguments does not score, and why."""
    return _reasons(self.score(*key), self._loader(*key))


@dataclasses.dataclass
class LatentScorer(Scorer):
  """Scores of a policy that reads a latent user variable: `inferred`, its mean, or `none`, 0.

  Attributes:
    log_probs: Rows with personas, or without for z = 0, to response log-probs [B, E, N].
  """

  def _loader(self, condition, shuffle=False, history=HistoryPolicy()):
    examples = shuffled(self.examples) if shuffle else self.examples
    formatting = self.formatting if condition == "inferred" else self.formatting.of_reference()
    return Loader(examples, dataclasses.replace(formatting, history=history), rows=self.rows)


@dataclasses.dataclass
class BridgeScorer:
  """Scores of a policy that reads P̃ through a learned bridge, each computed once.

  Attributes:
    log_probs: Rows that give P̃ to response log-probs [B, E, N].
    inferred_XPK: P̃ of each example as the head infers it, NaN where it could not be.
    formatting: of the policy; has the bridge's space.
  """

  name: str
  log_probs: Callable[[Rows], np.ndarray]
  examples: Sequence[Example]
  formatting: Formatting
  rows: int
  inferred_XPK: np.ndarray

  def __post_init__(self):
    self.score = functools.cache(self._score)

  def _score(self, condition: str, shuffle: bool = False) -> np.ndarray:
    loader, known_X = self._loader(condition, shuffle)
    label = f"{self.name}: {'shuffled ' if shuffle else ''}{condition}"
    scores = score_stream(self.log_probs, loader, describe=label)
    return np.where(known_X[:, None], scores, np.nan)

  def _loader(self, condition, shuffle=False):
    """What is scored, and of which examples there is a P̃ [X]."""
    preferences_XPK = self.preferences(condition)
    if shuffle:
      preferences_XPK = preferences_XPK[others(len(self.examples))]
    known_X = np.isfinite(preferences_XPK).all(axis=(1, 2))
    preferences_XPK = np.nan_to_num(preferences_XPK)  # a NaN would spread over its whole row
    formatting = dataclasses.replace(
      self.formatting,
      history=HistoryPolicy(),
      regions=dataclasses.replace(self.formatting.regions, persona=0, parts=0),
    )
    return Loader(self.examples, formatting, rows=self.rows, preferences=preferences_XPK), known_X

  def unscored(self, *key) -> dict[int, str]:
    """Index of each example that `score` of the same arguments does not score, and why."""
    loader, known_X = self._loader(*key)
    without = {int(i): f"no {key[0]} P̃ to tell" for i in np.flatnonzero(~known_X)}
    return _reasons(self.score(*key), loader) | without

  def preferences(self, condition: str) -> np.ndarray:
    """P̃ [X, P, K] under a condition, NaN where an example has none."""
    if condition == "inferred":
      return self.inferred_XPK
    preferences_XPK = np.zeros_like(self.inferred_XPK)
    if condition == "none":
      preferences_XPK[..., 1] = 1  # neutral in everything
      return preferences_XPK
    for i, example in enumerate(self.examples):
      labels_P = self.formatting.labels(example.directions)
      if labels_P is None:
        preferences_XPK[i] = np.nan
        continue
      # What the labels do not know of is as neutral as the rest.
      kinds_P = np.where(labels_P < 0, 1, labels_P)
      preferences_XPK[i, np.arange(len(kinds_P)), kinds_P] = 1
    return preferences_XPK


def _reasons(score_XN: np.ndarray, loader: Loader) -> dict[int, str]:
  """Index of each example that is not scored, and why."""
  reasons = {}
  for i in np.flatnonzero(~np.isfinite(score_XN).all(axis=1)).tolist():
    reasons[i] = "its log-prob is not finite"
    try:
      loader.tokenised(i)
    except Refused as reason:
      reasons[i] = str(reason)
  return reasons


@dataclasses.dataclass(frozen=True)
class Comparison:
  """A policy's scores beside its reference's, under one condition and protocol.

  Attributes:
    score_XN, reference_XN: response log-probs in nats, NaN where there is none.
    unscored: gives the index of each example that is not scored, and why.
  """

  policy: str
  condition: str
  protocol: str
  score_XN: np.ndarray
  reference_XN: np.ndarray
  unscored: Callable[[], dict[int, str]]

  @classmethod
  def of(cls, name, condition, protocol, scorer, key, base, base_key) -> "Comparison":
    """Of what two scorers give for their keys."""
    unscored = lambda: base.unscored(*base_key) | scorer.unscored(*key)
    scores = scorer.score(*key), base.score(*base_key)
    return cls(name, condition, protocol, *scores, unscored)

  def rows(self, examples: Sequence[Example]) -> list[dict]:
    """Of results.json: one, or none where no example could be scored."""
    ratio_XN = self.score_XN - self.reference_XN
    return accuracy_rows(self.policy, self.condition, self.protocol, examples, ratio_XN)


def compare_policy(
  policy: str,
  scorer: "Scorer | BridgeScorer",
  base: Scorer,
  *,
  protocols: Sequence[str] = PROTOCOLS,
) -> Iterator[Comparison]:
  """A trained policy beside the reference under each condition it has and protocol.

  The reference cannot read a learned bridge's tokens or a latent variable: there its prompt is the
  policy's without them, so `matched` and `unconditioned` are one.

  Args:
    policy: a key of CONDITIONS.
    base: scores of the reference model on the same pairs.
  """
  main = CONDITIONS[policy][0]
  for condition in CONDITIONS[policy]:
    key = (main, True) if condition == "shuffled" else (condition,)
    references = {"matched": key, "release": ("persona",), "unconditioned": ("none",)}
    if condition == "shuffled":
      references["release"] = ("persona", True)
    if isinstance(scorer, BridgeScorer | LatentScorer):
      references["matched"] = references.pop("unconditioned")
      protocols = dict.fromkeys("matched" if p == "unconditioned" else p for p in protocols)
    # Without a persona there is one prompt, hence one protocol.
    for protocol in (
      (p for p in protocols if p in references) if condition != "none" else ["matched"]
    ):
      yield Comparison.of(policy, condition, protocol, scorer, key, base, references[protocol])


def compare_base(base: Scorer, policies: Sequence[str]) -> Iterator[Comparison]:
  """The untrained base beside itself without a persona, under the conditions of policies."""
  for condition in dict.fromkeys(c for p in policies for c in CONDITIONS[p]):
    if condition not in ("shuffled", "none"):
      yield Comparison.of(
        base.name, condition, "unconditioned", base, (condition,), base, ("none",)
      )


def evaluate_policy(
  policy: str,
  scorer: "Scorer | BridgeScorer",
  base: Scorer,
  *,
  protocols: Sequence[str] = PROTOCOLS,
) -> list[dict]:
  """Alignment accuracy of a trained policy; arguments as of compare_policy.

  A condition that no record has (no labels, so no golden P̃) gives no row.
  """
  found = compare_policy(policy, scorer, base, protocols=protocols)
  return [row for one in found for row in one.rows(scorer.examples)]


def evaluate_base(base: Scorer, policies: Sequence[str]) -> list[dict]:
  """The untrained base: what the condition adds to its own unconditioned log-probs."""
  return [row for one in compare_base(base, policies) for row in one.rows(base.examples)]


def few_shot(base: Scorer) -> list[dict]:
  """Few-shot prompting: the untrained base reads a persona, which holds examples of choices.

  That is all of it; the compared pairs alone, as the examples; and, as the floor, the persona of
  another user.
  """
  reads = {
    "persona": (),
    "pairs": (False, HistoryPolicy(kinds=("pair",))),
    "shuffled": (True,),
  }
  results = []
  for condition, key in reads.items():
    ratio = base.score("persona", *key) - base.score("none")
    results += accuracy_rows(base.name, condition, "unconditioned", base.examples, ratio)
  return results


def accuracy_rows(policy, condition, protocol, examples, ratio) -> list[dict]:
  """One row, or none where the condition could not be scored at all."""
  margin = ratio[:, 0] - ratio[:, 1]
  scored = np.isfinite(margin)
  if not scored.any():
    logging.warning("%s, %s: no pair could be scored, so there is no such row.", policy, condition)
    return []
  correct = np.where(scored, margin > 0, np.nan)
  return [result(policy, condition, protocol, examples, correct)]
