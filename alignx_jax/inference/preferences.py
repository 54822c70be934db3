"""What a user's persona says of their preferences, P̃, and what P̃ makes of responses.

  model = load_preference_model("runs/study/pba_head")  # alignx_jax/preference_model.py
  inferred = infer_preferences(model, persona, post)
  steered = inferred.with_preferences({"Likes humor": 1.0})
  score_responses(model, post, ["Sure.", "Sure, and why did the hen …"], steered)

A persona may be of any length: its parts are read apart, and what they say adds up. So what is
known of a user can be kept, and of a new act nothing but the act is read:

  known = read_persona(model, persona)
  known = known.add(UserComment(post, comment))
  known.preferences(next_post)
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

from alignx_jax.inference.preference_model import PreferenceModel
from alignx_jax.models.bridge import Evidence
from alignx_jax.personas.distribution import Preferences
from alignx_jax.personas.persona import ComparedPair, HistoryItem, Persona, UserComment
from alignx_jax.personas.prompts import Part, act_parts, render_parts


@dataclasses.dataclass(frozen=True, eq=False)
class Known:
  """What was read of a user so far; in whatever order, and adding one by one or at once.

  Attributes:
    evidence: [P, Q, …], float64.
  """

  model: PreferenceModel
  evidence: Evidence = dataclasses.field(repr=False)

  def add(self, *acts: HistoryItem | str) -> "Known":
    """With what the user did since, or a text that describes them; only that is read.

    What is added twice counts twice.

    Raises:
      TypeError: an act is something else.
      ValueError: one is longer than what the model was made for.
    """
    parts = [part for act in acts for part in _parts_of(act)]
    return self + Known(self.model, self.model.read([parts])[0])

  def __add__(self, other: "Known") -> "Known":
    """What was read here and there, of the same user."""
    if self.model is not other.model:
      raise ValueError("What two models read cannot be added; read the persona with one of them.")
    return Known(self.model, self.evidence + other.evidence)

  def preferences(self, post: str = "") -> Preferences:
    """P̃ of the user where they are asked `post`; of this, only the post is read.

    Probabilities are those of infer_preferences within 1e-5 in float32: rows of other sizes are
    summed in another order. 2e-6 was the most measured, on simulated users with a trained head.
    """
    parts = render_parts(post, Persona())
    return self.model.preferences(self.evidence + self.model.read([parts])[0])


def read_persona(model: PreferenceModel, persona: Persona) -> Known:
  """Reads a persona, without any post.

  Raises:
    ValueError: a part of it is longer than what the model was made for; names it.
  """
  return Known(model, model.read([render_parts("", persona)])[0])


def infer_preferences(model: PreferenceModel, persona: Persona, post: str = "") -> Preferences:
  """P̃ of the user whose persona it is, where they are asked `post`; calibrated.

  All of the persona is read; labels that its acts may have are not. Where there is nothing to
  read, P̃ is how frequent preferences are in general.

  Raises:
    ValueError: a part of the persona is longer than what the model was made for; names it.
  """
  return infer_preferences_of(model, [persona], [post])[0]


def infer_preferences_of(
  model: PreferenceModel, personas: Sequence[Persona], posts: Sequence[str]
) -> list[Preferences]:
  """P̃ of many users, each asked the post in the same place; see infer_preferences.

  Raises:
    ValueError: there are not as many posts as personas; or a part is too long.
  """
  if isinstance(posts, str) or len(personas) != len(posts):
    raise ValueError(
      f"{len(personas)} personas and {1 if isinstance(posts, str) else len(posts)} posts: give a "
      "list with one post for each persona, '' for none."
    )
  parts = [render_parts(post, persona) for persona, post in zip(personas, posts, strict=True)]
  return [model.preferences(evidence) for evidence in model.read(parts)]


def score_responses(
  model: PreferenceModel, post: str, responses: Sequence[str], preferences: Preferences
) -> np.ndarray:
  """log π(y | x, P̃) in nats of each response y [responses], float32.

  Summed over the tokens of the response and its end, so the longer the lower. It is of use
  beside another: the same response under another P̃, or under Preferences.neutral(model.space),
  which says nothing.

  Raises:
    ValueError: P̃ is of another space; the responses are no list, or empty; or they are longer
      with the post than what the model was made for.
  """
  if isinstance(responses, str) or not len(responses):
    raise ValueError("Give a list of one response or more.")
  return model.log_probs(post, responses, preferences)


def _parts_of(act: HistoryItem | str) -> list[Part]:
  if isinstance(act, str):
    return render_parts("", Persona(description=act))
  if isinstance(act, UserComment | ComparedPair):
    return act_parts(act)
  raise TypeError(
    f"A {type(act).__name__} was to be added; give a UserComment, a ComparedPair, or a text that "
    "describes the user."
  )
