"""Simulated users: known directions, and the posts and responses that express them.

A user has a direction on a handful of the 90 dimensions and is neutral on the rest. What
they write and choose expresses some of those directions in words ("I would snap photos at
golden hour") and, as noise, poles of dimensions on which they are neutral. The chosen
and the rejected response of a pair speak of the same dimensions with opposite poles, so
without the user's history they are exchangeable, and their lengths have one distribution.

User `index` of a split is the same everywhere: it depends on (seed, split, index) only.
"""

import dataclasses
import functools
import json
import re
from pathlib import Path

import numpy as np

from alignx_jax.personas.preferences import NEUTRAL, PreferenceSpace, alignx_space
from alignx_jax.personas.prompts import Piece, fill, render_prompt, render_response

SPLITS = ("base", "train", "validation", "test")

_CARRIERS = (
  "I would {phrase}.",
  "Maybe {phrase}.",
  "You could {phrase}.",
  "First {phrase}.",
  "Try to {phrase}.",
  "I always {phrase}.",
)


@dataclasses.dataclass(frozen=True)
class SimulatorConfig:
  """How users and texts are drawn; each pair is an inclusive range.

  Attributes:
    dimensions: non-neutral dimensions of a user.
    expressed: dimensions of the user that one text expresses.
    sentences: on each of them.
    noise: poles of the user's neutral dimensions mixed into one text.
    described: dimensions of the user that the description gives away.
    comments, pairs: history items of a persona.
    among: indices of the dimensions that users are drawn from, no fewer than theirs; empty: all.
  """

  dimensions: tuple[int, int] = (3, 5)
  expressed: tuple[int, int] = (2, 3)
  sentences: tuple[int, int] = (1, 1)
  noise: tuple[int, int] = (0, 1)
  described: tuple[int, int] = (1, 1)
  comments: tuple[int, int] = (2, 3)
  pairs: tuple[int, int] = (1, 2)
  among: tuple[int, ...] = ()


# Users whose records are about as long as the published ones: a context's median is some
# 1,500 tokens.
TALKATIVE = SimulatorConfig(sentences=(4, 8), comments=(2, 6), pairs=(2, 6))


@dataclasses.dataclass(frozen=True)
class SimulatedUser:
  """A user: directions [P], and the generator that draws everything they say."""

  directions: np.ndarray
  rng: np.random.Generator
  config: SimulatorConfig
  wordings: tuple[int, ...] = tuple(range(6))  # of each pole's phrases, those the user uses

  @property
  def active(self) -> np.ndarray:
    return np.flatnonzero(self.directions != NEUTRAL)

  def draw_expressed(self) -> np.ndarray:
    """Indices of the dimensions that one text speaks of, once for each sentence."""
    count = min(_between(self.rng, self.config.expressed), len(self.active))
    expressed = self.rng.choice(self.active, size=count, replace=False)
    return np.repeat(expressed, _between(self.rng, self.config.sentences))

  def draw_noise(self) -> list[tuple[int, float]]:
    """(dimension, direction) of poles that say nothing of the user."""
    neutral = np.flatnonzero(self.directions == NEUTRAL)
    chosen = self.rng.choice(neutral, size=_between(self.rng, self.config.noise), replace=False)
    return [(int(d), float(self.rng.integers(2))) for d in chosen]

  def write(self, expressed, *, flip: bool = False, noise=()) -> str:
    """A text that expresses these dimensions as the user would, or the opposite."""
    poles = [(int(d), abs(float(self.directions[d]) - flip)) for d in expressed] + list(noise)
    return " ".join(
      _CARRIERS[self.rng.integers(len(_CARRIERS))].format(phrase=self._phrase(*poles[i]))
      for i in self.rng.permutation(len(poles))
    )

  def post(self) -> str:
    posts = _wording()["posts"]
    return posts[self.rng.integers(len(posts))]

  def _phrase(self, dimension: int, direction: float) -> str:
    pole = "positive" if direction > NEUTRAL else "negative"
    phrases = _wording()["phrases"][dimension][pole]
    return phrases[self.wordings[self.rng.integers(len(self.wordings))]]


@functools.cache
def _wording() -> dict:
  path = Path(__file__).with_name("simulated_phrases.json")
  return json.loads(path.read_text(encoding="utf-8"))


@functools.cache
def _phrases() -> tuple[re.Pattern, dict[str, tuple[int, float]]]:
  """What finds phrases in a text, and the (dimension, direction) that each expresses."""
  poles = {
    phrase.casefold(): (dimension, float(pole == "positive"))
    for dimension, phrases in enumerate(_wording()["phrases"])
    for pole in phrases
    for phrase in phrases[pole]
  }
  # The longest first: one phrase begins another.
  words = [re.escape(phrase) for phrase in sorted(poles, key=len, reverse=True)]
  return re.compile(rf"\b(?:{'|'.join(words)})\b"), poles


def expressed_directions(text: str, space: PreferenceSpace) -> np.ndarray:
  """The directions that a text's wording expresses: the inverse of SimulatedUser.write.

  A pole is expressed by one of its phrases, whole; how often does not matter.

  Returns:
    float [P], of `space`: 0 or 1 where one pole is expressed, NEUTRAL where none or both are, or
    where the simulator has no words for the dimension.
  """
  pattern, poles = _phrases()
  text = " ".join(text.casefold().split())
  found = {poles[match] for match in pattern.findall(text)}
  directions_P = np.full(len(alignx_space()), NEUTRAL)
  for dimension, direction in found:
    directions_P[dimension] += direction - NEUTRAL
  return np.nan_to_num(space.translate(directions_P, alignx_space()), nan=NEUTRAL)


def _between(rng: np.random.Generator, bounds: tuple[int, int]) -> int:
  return int(rng.integers(bounds[0], bounds[1] + 1))


def simulate_user(
  index: int, *, split: str, seed: int, config: SimulatorConfig = SimulatorConfig()
) -> SimulatedUser:
  """User `index` of a split. Splits never share a user."""
  rng = np.random.default_rng([seed, SPLITS.index(split), index])
  directions_P = np.full(len(alignx_space()), NEUTRAL)
  count = _between(rng, config.dimensions)
  active = rng.choice(config.among or len(directions_P), size=count, replace=False)
  directions_P[active] = rng.integers(2, size=count)
  return SimulatedUser(directions_P, rng, config)


def simulate_record(
  index: int, *, split: str, seed: int, config: SimulatorConfig = SimulatorConfig()
) -> dict:
  """Record `index` of a split, one user each, in the published schema.

  A `Preference Direction` is that of the text or pair it stands with: the user's
  directions where the text speaks of them, neutral elsewhere.
  """
  user = simulate_user(index, split=split, seed=seed, config=config)

  def labels(expressed):
    directions_P = np.full(len(user.directions), NEUTRAL)
    directions_P[expressed] = user.directions[expressed]
    return [int(d) if d != NEUTRAL else NEUTRAL for d in directions_P]

  def comment():
    expressed = user.draw_expressed()
    text = user.write(expressed, noise=user.draw_noise())
    return {"prompt": user.post(), "comment": text, "Preference Direction": labels(expressed)}

  def pair():
    expressed, noise = user.draw_expressed(), user.draw_noise()
    other_noise = [(dimension, float(user.rng.integers(2))) for dimension, _ in noise]
    return {
      "prompt": user.post(),
      "chosen": user.write(expressed, noise=noise),
      "rejected": user.write(expressed, flip=True, noise=other_noise),
      "Preference Direction": labels(expressed),
    }

  history = {
    "User-Generated Content": [comment() for _ in range(_between(user.rng, config.comments))],
    "Pair-wise Comparative Feedback": [pair() for _ in range(_between(user.rng, config.pairs))],
  }
  given_away = np.full(len(user.directions), NEUTRAL)
  told = user.rng.choice(user.active, size=_between(user.rng, config.described), replace=False)
  given_away[told] = user.directions[told]
  return pair() | history | {"Demographic Information": describe(given_away, alignx_space())}


def describe(directions_P, space: PreferenceSpace) -> str:
  """A description (DEMO) of a user with these directions."""
  return f"Someone of whom friends say: {space.verbalise(directions_P)}."


def simulate_document(index: int, *, seed: int) -> list[Piece]:
  """Document `index` of the text a small base model is pre-trained on.

  Plain text of people who are consistent with themselves, as in any corpus: one author's
  comments; a list of preferences, worded as the text bridge words it, and the comments of
  who holds them; one preference and a comment that speaks of nothing else; and chat, in
  which the assistant has no preferences. So the base knows what the poles' names mean, and
  can tell an author by their words; it has seen neither a comparison nor a persona answered
  in a way that suits it.
  """
  user = simulate_user(index, split="base", seed=seed, config=SimulatorConfig(dimensions=(1, 4)))
  kind = user.rng.choice(["author", "described", "devoted", "chat"], p=[0.25, 0.25, 0.45, 0.05])
  if kind == "chat":
    stranger = dataclasses.replace(user, directions=user.rng.integers(2, size=len(user.directions)))
    text = stranger.write(stranger.draw_expressed())
    prompt = render_prompt(user.post(), chat="chatml", prompt="default")
    return prompt + render_response(text, chat="chatml", prompt="default")
  if kind == "devoted":
    dimension = int(user.rng.choice(user.active))
    texts = [user.write([dimension] * _between(user.rng, (1, 3)))]
    stated_P = np.full_like(user.directions, NEUTRAL)
    stated_P[dimension] = user.directions[dimension]
  else:
    habit = user.rng.permutation(6)[: user.rng.choice([1, 2, 6])]
    user = dataclasses.replace(user, wordings=tuple(habit))
    count = _between(user.rng, (4, 12) if kind == "author" else (1, 2))
    texts = [user.write(user.draw_expressed(), noise=user.draw_noise()) for _ in range(count)]
    stated_P = user.directions
  pieces = []
  if kind != "author":
    pieces = fill("Preferences: {profile}\n\n", profile=alignx_space().verbalise(stated_P))
  for text in texts:
    pieces += fill("Post: {post}\nComment: {comment}\n\n", post=user.post(), comment=text)
  return pieces + fill("<|im_end|>")
