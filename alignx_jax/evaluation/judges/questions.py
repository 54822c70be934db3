"""What a judge is asked and what it says.

A judge is a callable, of any kind: questions to verdicts, one for each in the same order. Questions
come many at once, so that a model can batch them and an endpoint can ask several together; verdicts
may come one by one. What a judge cannot say is a verdict with a reason, never an exception for one
question's sake.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from alignx_jax.data.records import Example


class Question(NamedTuple):
  """Which of two responses would this user prefer?

  Attributes:
    asked: the post, the persona and what is known of P̃; its responses mean nothing.
    a, b: the responses, in the order shown.
    directions: preference directions [P] of the user, where they are known for certain.
  """

  asked: Example
  a: str
  b: str
  directions: np.ndarray | None = None


class Verdict(NamedTuple):
  """What a judge says of a question.

  Attributes:
    preference: for `a`, 0 … 1, 0.5 for a tie; None where there is no verdict.
    failure: why there is none.
    facts: what it rests on, plain values for the record.
  """

  preference: float | None
  failure: str = ""
  facts: Mapping[str, Any] = {}


Judge = Callable[[Sequence[Question]], Iterable[Verdict]]
