"""What a user is: what they wrote (UGC), chose (PAIR) and are (DEMO)."""

import dataclasses

import numpy as np


@dataclasses.dataclass(frozen=True)
class UserComment:
  """A comment the user wrote under a post; `directions` [P] where they are known."""

  post: str
  comment: str
  directions: np.ndarray | None = None


@dataclasses.dataclass(frozen=True)
class ComparedPair:
  """Two responses to a post that the user compared; `directions` [P] where known."""

  post: str
  chosen: str
  rejected: str
  directions: np.ndarray | None = None


HistoryItem = UserComment | ComparedPair


@dataclasses.dataclass(frozen=True)
class Persona:
  """One user's persona; any of the three kinds may be empty."""

  comments: tuple[UserComment, ...] = ()
  pairs: tuple[ComparedPair, ...] = ()
  description: str = ""

  @property
  def history(self) -> tuple[HistoryItem, ...]:
    """Comments, then pairs, each in the order kept: the first is the oldest."""
    return self.comments + self.pairs

  def drop_oldest(self) -> "Persona":
    """The persona without its oldest history item."""
    if self.comments:
      return dataclasses.replace(self, comments=self.comments[1:])
    return dataclasses.replace(self, pairs=self.pairs[1:])


HISTORY_POLICIES = ("release", "all")


def sample_history(persona: Persona, policy: str, rng: np.random.Generator) -> Persona:
  """Chooses which history items a prompt shows.

  `release`: as the AlignX release trains: the numbers of comments and of pairs are drawn
  from 0..4 independently and uniformly and the first so many are kept; if both are 0,
  all are. The description is dropped: it is never used in training there.
  `all`: everything, as it evaluates.

  Raises:
    ValueError: an unknown policy.
  """
  if policy == "all":
    return persona
  if policy != "release":
    raise ValueError(f"No history policy {policy!r}. There are: {', '.join(HISTORY_POLICIES)}.")
  comments, pairs = rng.integers(0, 5, size=2)
  kept = Persona(persona.comments[:comments], persona.pairs[:pairs])
  return kept if kept.history else Persona(persona.comments, persona.pairs)
