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

  def drop_oldest(self, *, newest_first: bool = False) -> "Persona":
    """The persona without its oldest history item: of the comments while there are any."""
    kept = slice(-1) if newest_first else slice(1, None)
    if self.comments:
      return dataclasses.replace(self, comments=self.comments[kept])
    return dataclasses.replace(self, pairs=self.pairs[kept])


POLICIES = ("release", "all", "fixed")
KINDS = ("ugc", "pair", "demo")
ORDERS = ("kept", "reversed", "shuffled")


@dataclasses.dataclass(frozen=True)
class HistoryPolicy:
  """Which parts of a persona a prompt shows.

  Attributes:
    policy: `release`, as the AlignX release trains: the numbers of comments and of pairs are
      drawn from 0..4 independently and uniformly and the first so many are kept; if both
      are 0, all are; the description is dropped, as it is never used in training there.
      `all`: everything, as it evaluates. `fixed`: `items` of the history, drawn without
      replacement and in the order kept; all of them if there are fewer.
    kinds: what is shown at all: comments (`ugc`), pairs (`pair`), the description (`demo`).
    order: of comments and of pairs: as `kept`, oldest first, `reversed`, or `shuffled`.
  """

  policy: str = "all"
  items: int = 0
  kinds: tuple[str, ...] = KINDS
  order: str = "kept"

  def __post_init__(self):
    known = [("policy", self.policy, POLICIES), ("order", self.order, ORDERS)]
    for name, value, allowed in known + [("kinds", kind, KINDS) for kind in self.kinds]:
      if value not in allowed:
        raise ValueError(f"history.{name} is {value!r}; use {', '.join(allowed)}.")
    if self.items < 0 or (self.items and self.policy != "fixed"):
      raise ValueError(
        f"history.items is {self.items}; it is 0 or more, and for the policy 'fixed' alone."
      )

  @property
  def random(self) -> bool:
    """Whether the same persona is shown differently each time."""
    return self.policy != "all" or self.order == "shuffled"


def sample_history(persona: Persona, policy: HistoryPolicy, rng: np.random.Generator) -> Persona:
  """The part of a persona that a prompt shows."""
  comments = persona.comments if "ugc" in policy.kinds else ()
  pairs = persona.pairs if "pair" in policy.kinds else ()
  description = persona.description if "demo" in policy.kinds else ""
  if policy.policy == "release":
    shown = rng.integers(0, 5, size=2)
    if (kept := (comments[: shown[0]], pairs[: shown[1]])) != ((), ()):
      comments, pairs = kept
    description = ""
  elif policy.policy == "fixed":
    total = len(comments) + len(pairs)
    drawn = set(rng.permutation(total)[: policy.items])
    pairs = tuple(pair for i, pair in enumerate(pairs, len(comments)) if i in drawn)
    comments = tuple(comment for i, comment in enumerate(comments) if i in drawn)
  if policy.order == "reversed":
    comments, pairs = comments[::-1], pairs[::-1]
  elif policy.order == "shuffled":
    comments = tuple(comments[i] for i in rng.permutation(len(comments)))
    pairs = tuple(pairs[i] for i in rng.permutation(len(pairs)))
  return Persona(comments, pairs, description)
