"""What a model's condition of a user adds to the log-probs of responses."""

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np

from alignx_jax.data.formatting import Formatting, Refused, tokenise
from alignx_jax.data.records import Example
from alignx_jax.data.rows import Regions
from alignx_jax.evaluation.accuracy import BridgeScorer, Scorer
from alignx_jax.experiments.policies import Loaded
from alignx_jax.personas.distribution import Preferences
from alignx_jax.personas.persona import HistoryPolicy
from alignx_jax.training import mesh as meshes
from alignx_jax.training.reference import LogProbs

_ANY_LENGTH = 2**30
_ROWS = 8  # of a batch, unless there are more devices


def persona_gain(loaded: Loaded) -> Callable[[Sequence[Example]], np.ndarray]:
  """What a model's own condition c of a user adds to the log-prob of responses.

  Of examples it gives log π(y | x, c) − log π(y | x) [X, N] in nats, NaN where that cannot be
  scored whole; nothing of a persona is left out. `c` is what the policy was trained on; with a
  learned bridge "without c" is P̃ neutral in everything.
  """
  is_head = loaded.formatting.condition == "bridge"
  shards = meshes.row_shards(loaded.mesh)
  rows = shards * max(1, _ROWS // shards)
  log_probs = LogProbs(
    loaded.model, loaded.params, loaded.mesh, rows, loaded.config.train.head_chunk
  )

  def gain(examples: Sequence[Example]) -> np.ndarray:
    gain_XN = np.full((len(examples), 2), np.nan, np.float32)
    inferred = [None] * len(examples)
    if loaded.infer is not None:
      inferred = _inferred(loaded.infer, examples)
      if not is_head:
        told = lambda p: None if p is None else p.verbalise(loaded.config.bridge.threshold)
        examples = [
          dataclasses.replace(example, profile=told(preferences))
          for example, preferences in zip(examples, inferred, strict=True)
        ]
    formatting = dataclasses.replace(loaded.formatting, history=HistoryPolicy())
    sizes = [_sizes(example, formatting) for example in examples]
    most = loaded.model.arch.max_positions - is_head
    fits = [
      i
      for i, size in enumerate(sizes)
      if size and sum(size) <= most and not (is_head and inferred[i] is None)
    ]
    if not fits:
      return gain_XN
    longest = np.max([sizes[i] for i in fits], axis=0)
    regions = Regions(*(128 * -(-int(size) // 128) for size in longest), 1)
    formatting = dataclasses.replace(formatting, regions=regions)
    of = [examples[i] for i in fits]
    if is_head:
      inferred_XPK = np.stack([np.asarray(inferred[i].probabilities_PK) for i in fits])
      scorer = BridgeScorer("judge", log_probs, of, formatting, rows, inferred_XPK)
      condition = "inferred"
    else:
      scorer = Scorer("judge", log_probs, of, formatting, rows)
      condition = formatting.condition
    gain_XN[fits] = scorer.score(condition) - scorer.score("none")
    return gain_XN

  return gain


def _sizes(example: Example, formatting: Formatting) -> tuple[int, int] | None:
  """Tokens of an example's context and of its longer response; None where it cannot be told."""
  regions = Regions(_ANY_LENGTH, _ANY_LENGTH, 1)
  try:
    found = tokenise(example, dataclasses.replace(formatting, regions=regions), example.persona)
  except Refused:
    return None
  context, *responses = found.sizes
  return context, max(responses)


def _inferred(infer, examples: Sequence[Example]) -> list[Preferences | None]:
  """P̃ of each example's user; None where a part of the persona is too long."""
  try:
    return infer([e.persona for e in examples], [e.post for e in examples])
  except ValueError:
    if len(examples) == 1:
      return [None]
    return [x for example in examples for x in _inferred(infer, [example])]
