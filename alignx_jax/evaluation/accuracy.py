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
from collections.abc import Callable, Sequence

import numpy as np

from alignx_jax.data.loader import ConditionError, Formatting, Loader
from alignx_jax.data.records import Example
from alignx_jax.data.rows import Rows
from alignx_jax.training.reference import score_stream

PROTOCOLS = ("matched", "release", "unconditioned")
CONDITIONS = {
  "ica": ("persona", "shuffled", "none"),
  "pba": ("inferred", "golden", "shuffled", "none"),
}


def bootstrap_interval(
  correct: np.ndarray, *, samples: int = 2000, seed: int = 0
) -> tuple[float, float]:
  """95 % percentile interval of the mean, resampling pairs with replacement."""
  rng = np.random.default_rng(seed)
  means = [rng.choice(correct, len(correct)).mean() for _ in range(samples)]
  low, high = np.percentile(means, [2.5, 97.5])
  return float(low), float(high)


def result(policy: str, condition: str, protocol: str, correct: np.ndarray, **more) -> dict:
  """One row of results.json from each pair's outcome, 0 … 1."""
  low, high = bootstrap_interval(correct)
  return {
    "policy": policy,
    "condition": condition,
    "protocol": protocol,
    "accuracy": float(correct.mean()),
    "low": low,
    "high": high,
    "examples": len(correct),
    **more,
  }


def length_control(examples: Sequence[Example]) -> dict:
  """'The longer response wins', in characters; a tie counts as a half, as a coin would."""
  longer = [np.sign(len(e.chosen) - len(e.rejected)) for e in examples]
  return result("length", "length", "none", (np.asarray(longer) + 1) / 2)


def shuffled(examples: Sequence[Example], *, seed: int = 0) -> list[Example]:
  """Each example with the persona, profile and labels of another one."""
  order = np.random.default_rng(seed).permutation(len(examples))
  other = np.empty_like(order)
  other[order] = np.roll(order, 1)  # one cycle through all: nobody keeps their own
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
    log_probs: Rows to response log-probs [B, N, E].
    formatting: its condition and history are replaced as needed.
  """

  name: str
  log_probs: Callable[[Rows], np.ndarray]
  examples: Sequence[Example]
  formatting: Formatting
  rows: int

  def __post_init__(self):
    self.score = functools.cache(self._score)

  def _score(self, condition: str, shuffle: bool = False) -> np.ndarray:
    examples = shuffled(self.examples) if shuffle else self.examples
    formatting = dataclasses.replace(self.formatting, condition=condition, history="all")
    loader = Loader(examples, formatting, rows=self.rows)
    label = f"{self.name}: {'shuffled ' if shuffle else ''}{condition}"
    return score_stream(self.log_probs, loader, describe=label)


def evaluate_policy(
  policy: str, scorer: Scorer, base: Scorer, *, protocols: Sequence[str] = PROTOCOLS
) -> list[dict]:
  """Alignment accuracy of a trained policy under each condition it has and protocol.

  Pairs that do not fit the row are left out of every mean and counted as `refused`.

  Args:
    policy: "ica" or "pba".
    base: scores of the reference model on the same pairs.
  """
  main = CONDITIONS[policy][0]
  results = []
  for condition in CONDITIONS[policy]:
    key = (main, True) if condition == "shuffled" else (condition,)
    references = {"matched": key, "release": ("persona",), "unconditioned": ("none",)}
    if condition == "shuffled":
      references["release"] = ("persona", True)
    # Without a persona there is one prompt, hence one protocol.
    names = [p for p in protocols if condition != "none" or p == "matched"]
    for protocol in names:
      try:
        ratio = scorer.score(*key) - base.score(*references[protocol])
      except ConditionError:
        continue  # e.g. no labels, so no golden P̃: the row is absent, never guessed
      results.append(_accuracy(policy, condition, protocol, ratio))
  return results


def evaluate_base(base: Scorer, policies: Sequence[str]) -> list[dict]:
  """The untrained base: what the condition adds to its own unconditioned log-probs."""
  results = []
  for condition in dict.fromkeys(CONDITIONS[p][i] for p in policies for i in (0, 1)):
    if condition == "shuffled":
      continue
    try:
      ratio = base.score(condition) - base.score("none")
    except ConditionError:
      continue
    results.append(_accuracy("base", condition, "unconditioned", ratio))
  return results


def _accuracy(policy, condition, protocol, ratio) -> dict:
  margin = ratio[:, 0] - ratio[:, 1]
  scored = np.isfinite(margin)
  correct = (margin[scored] > 0).astype(np.float64)
  return result(policy, condition, protocol, correct, refused=int((~scored).sum()))
