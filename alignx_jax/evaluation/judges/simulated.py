"""The simulator's ground truth: a user's known directions beside those that words express."""

from collections.abc import Iterator, Sequence

import numpy as np

from alignx_jax.evaluation.judges.questions import Judge, Question, Verdict
from alignx_jax.personas.preferences import NEUTRAL, PreferenceSpace
from alignx_jax.personas.simulator import expressed_directions


def simulated_judge(space: PreferenceSpace) -> Judge:
  """Prefers the response that expresses more of the user's preferences, less what contradicts them.

  A dimension counts once however often a response speaks of it, and not at all where the user is
  neutral.

  Args:
    space: of the users' directions.
  """

  def judge(questions: Sequence[Question]) -> Iterator[Verdict]:
    for question in questions:
      if question.directions is None:
        yield Verdict(None, "the user is not simulated, so nobody knows what they prefer")
        continue
      counts = [_count(text, question.directions, space) for text in (question.a, question.b)]
      a, b = (agree - oppose for agree, oppose in counts)
      facts = {"agree_a": counts[0][0], "oppose_a": counts[0][1]}
      facts |= {"agree_b": counts[1][0], "oppose_b": counts[1][1]}
      yield Verdict(float(np.sign(a - b) / 2 + 0.5), facts=facts)

  return judge


def _count(text: str, directions_P: np.ndarray, space: PreferenceSpace) -> tuple[int, int]:
  """Dimensions on which a text is of the user's mind, and on which of the opposite."""
  product_P = (expressed_directions(text, space) - NEUTRAL) * (directions_P - NEUTRAL)
  return int((product_P > 0).sum()), int((product_P < 0).sum())
