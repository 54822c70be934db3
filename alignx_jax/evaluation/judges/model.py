"""A model's own log-probs as a judge: which response does the persona make more probable?"""

import dataclasses
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from alignx_jax.data.records import Example
from alignx_jax.evaluation.judges.questions import Judge, Question, Verdict


def model_judge(gain: Callable[[Sequence[Example]], np.ndarray]) -> Judge:
  """Prefers the response whose log-prob the persona raises more.

  The preference for `a` is σ(g(a) − g(b)), g(y) = log π(y | x, c) − log π(y | x), in nats: what
  the persona says for a response, whatever its length and its fluency without one.

  Args:
    gain: pairs of responses, as an Example's chosen and rejected, to g [X, N]; NaN where it
      cannot be computed.
  """

  def judge(questions: Sequence[Question]) -> Iterator[Verdict]:
    if not questions:
      return
    # Each response is scored by itself: one pair stands for both orders.
    keys = [(id(q.asked), *sorted((q.a, q.b))) for q in questions]
    distinct = {
      key: dataclasses.replace(q.asked, chosen=key[1], rejected=key[2])
      for key, q in zip(keys, questions, strict=True)
    }
    found_XN = gain(list(distinct.values()))
    gains = dict(zip(distinct, np.asarray(found_XN, float), strict=True))
    for key, question in zip(keys, questions, strict=True):
      a, b = gains[key] if question.a == key[1] else gains[key][::-1]
      if not np.isfinite(a - b):
        yield Verdict(
          None,
          "the model cannot score it: it is longer than what the model was made for, or the "
          "request lacks what the model's prompt states of a user",
        )
        continue
      facts = {"gain_a": round(float(a), 4), "gain_b": round(float(b), 4)}
      yield Verdict(float(np.exp(-np.logaddexp(0, b - a))), facts=facts)

  return judge
