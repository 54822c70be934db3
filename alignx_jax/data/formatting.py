"""From an example to token ids: the condition it states, the prompt, its three parts."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from alignx_jax.data.records import Example
from alignx_jax.data.rows import Regions, Tokenised, TokenisedPart
from alignx_jax.data.tokenizers import Tokenizer
from alignx_jax.personas.persona import HistoryPolicy, Persona
from alignx_jax.personas.preferences import PreferenceSpace
from alignx_jax.personas.prompts import (
  Part,
  chat_format,
  prompt_format,
  render_parts,
  render_prompt,
  render_response,
)

CONDITIONS = ("persona", "inferred", "profile", "golden", "bridge", "latent", "none")


class Refused(Exception):
  """An example that cannot be used; the message is the reason, the same for all of a kind."""


@dataclasses.dataclass(frozen=True)
class Formatting:
  """How an example becomes token ids.

  Attributes:
    chat, prompt: names of the chat and prompt formats (personas/prompts.py).
    condition: what the policy is conditioned on: the raw `persona` (ICA), P̃ `inferred`
      from the labels of the history, as the record's `profile` has it, or `golden` from the
      record's label, all as text (PBA); P̃ as tokens of a learned `bridge`, before a prompt
      that says nothing of the user; a `latent` variable of the pairs, which moves such a
      prompt's soft tokens; or `none`.
    history: which parts of a persona the prompt shows.
    space: of the records' directions.
    bridge_space: of a learned bridge; None if it is the records'.
  """

  tokenizer: Tokenizer
  space: PreferenceSpace
  regions: Regions
  chat: str
  prompt: str
  condition: str
  history: HistoryPolicy = HistoryPolicy()
  bridge_space: PreferenceSpace | None = None

  def __post_init__(self):
    if self.condition not in CONDITIONS:
      raise ValueError(f"No condition {self.condition!r}. There are: {', '.join(CONDITIONS)}.")
    prompt_format(self.prompt)
    missing = [
      t for t in chat_format(self.chat)["special_tokens"] if t not in self.tokenizer.special_ids
    ]
    if missing:
      raise ValueError(
        f"The tokenizer has no {missing[0]!r}, which the chat format {self.chat!r} needs; "
        "set config.prompt.chat to this model's format."
      )
    if self.bos and self.tokenizer.bos_id is None:
      raise ValueError(
        f"The tokenizer has no bos token, with which prompts of chat format {self.chat!r} and "
        f"prompt format {self.prompt!r} begin; set config.prompt.* to formats without."
      )

  @property
  def bos(self) -> bool:
    """Whether prompts begin with the bos token: the chat format's habit, unless the prompt
    format, like those of the release, has its own."""
    return prompt_format(self.prompt).get("bos", chat_format(self.chat)["bos"])

  @property
  def dimensions(self) -> int:
    """P, of the labels that rows have; 0 where they have none."""
    return 0 if self.condition == "latent" else len(self.space_of_bridge)

  @property
  def space_of_bridge(self) -> PreferenceSpace:
    """The dimensions of a learned bridge."""
    return self.bridge_space or self.space

  def labels(self, directions_P: np.ndarray | None) -> np.ndarray | None:
    """Directions in the space of a learned bridge as labels: 0, 1, 2; −1 where not known.

    None where they are not known at all, or nothing reads them.
    """
    if directions_P is None or not self.dimensions:
      return None
    if self.bridge_space is not None:
      directions_P = self.bridge_space.translate(directions_P, self.space)
    return np.nan_to_num(2 * directions_P, nan=-1.0).astype(np.int8)

  def of_reference(self) -> "Formatting":
    """How the reference of the DPO loss is prompted: as the policy.

    It cannot read what is learned of a user, so there its prompt is the policy's without that.
    In such a one, which says nothing of the user, nothing is drawn.
    """
    if self.condition not in ("bridge", "latent", "none"):
      return self
    regions = dataclasses.replace(self.regions, persona=0, parts=0)
    return dataclasses.replace(self, condition="none", history=HistoryPolicy(), regions=regions)


def infer_profile(example: Example, persona: Persona, space: PreferenceSpace) -> str:
  """P̃ as text, inferred from the history shown: the release's bridge.

  The verbalised aggregate of the items' directions; where no item has any, the record's
  precomputed profile.

  Raises:
    Refused: the record has neither, or directions for some items only.
  """
  directions = [item.directions for item in persona.history]
  if directions and all(d is not None for d in directions):
    return space.verbalise(space.aggregate(directions))
  if any(d is not None for d in directions):
    raise Refused("no inferred P̃: some history items lack 'Preference Direction'")
  if example.profile is not None:
    return example.profile
  raise Refused("no inferred P̃: neither history directions nor 'profile'")


def tokenise_parts(parts: Sequence[Part], formatting: Formatting) -> tuple[TokenisedPart, ...]:
  """Token ids of what a learned bridge or the encoder of a latent variable reads.

  Each part is a sequence by itself.
  """
  tokenizer = formatting.tokenizer
  begin = [tokenizer.bos_id] if formatting.bos else []
  return tuple(
    TokenisedPart(
      begin + tokenizer.encode_pieces(part.pieces), part.kind, formatting.labels(part.directions)
    )
    for part in parts
  )


def condition_of(example: Example, persona: Persona, formatting: Formatting) -> dict[str, Any]:
  """The keyword of render_prompt that states the condition."""
  if formatting.condition == "persona":
    return {"persona": persona}
  if formatting.condition == "inferred":
    return {"profile": infer_profile(example, persona, formatting.space)}
  if formatting.condition == "profile":
    if example.profile is None:
      raise Refused("no P̃: the record has no 'profile'")
    return {"profile": example.profile}
  if formatting.condition == "golden":
    if example.directions is None:
      raise Refused("no golden P̃: the record has no 'Preference Direction'")
    return {"profile": formatting.space.verbalise(example.directions)}
  return {}


def tokenise(example: Example, formatting: Formatting, persona: Persona) -> Tokenised:
  """An example's token ids.

  A context that is too long drops its oldest history items first. A response or the end
  of a prompt is never cut.

  Raises:
    Refused: a response, or the context without any history, is longer than its region; or
      the record lacks what the condition needs.
  """
  tokenizer, regions = formatting.tokenizer, formatting.regions
  names = {"chat": formatting.chat, "prompt": formatting.prompt}
  responses = [
    tokenizer.encode_pieces(render_response(text, **names))
    for text in (example.chosen, example.rejected)
  ]
  if max(map(len, responses)) > regions.response:
    raise Refused("response longer than its region")
  if formatting.condition in ("bridge", "latent"):
    return _tokenise_for_bridge(example, formatting, persona, responses)
  condition = condition_of(example, persona, formatting)
  for dropped in range(len(persona.history) + 1):
    ids = prompt_ids(example.post, formatting, **condition)
    # The last token of the context moves to the responses.
    if len(ids) - 1 <= regions.context:
      return Tokenised(ids, *responses, dropped)
    if "persona" not in condition:
      break
    newest_first = formatting.history.order == "reversed"
    condition = {"persona": condition["persona"].drop_oldest(newest_first=newest_first)}
  raise Refused("context longer than its region")


def prompt_ids(post: str, formatting: Formatting, **condition) -> list[int]:
  """Token ids before a response; `condition` is what condition_of gives."""
  pieces = render_prompt(post, chat=formatting.chat, prompt=formatting.prompt, **condition)
  begin = [formatting.tokenizer.bos_id] if formatting.bos else []
  return begin + formatting.tokenizer.encode_pieces(pieces)


def _tokenise_for_bridge(example, formatting, persona, responses) -> Tokenised:
  """The prompt without the persona; the persona's parts by themselves, if they have a region."""
  regions = formatting.regions
  ids = prompt_ids(example.post, formatting)
  if len(ids) - 1 > regions.context:
    raise Refused("prompt longer than its region")
  if not regions.persona:
    return Tokenised(ids, *responses)
  labels, post = formatting.labels(example.directions), example.post
  if formatting.condition == "latent":
    post, persona = "", Persona(pairs=persona.pairs)
  for dropped in range(len(persona.history) + 1):
    parts = tokenise_parts(render_parts(post, persona), formatting)
    tokenised = Tokenised(ids, *responses, dropped, parts, labels)
    if all(np.less_equal(tokenised.sizes, regions.room)):
      return tokenised
    if persona.history:
      persona = persona.drop_oldest(newest_first=formatting.history.order == "reversed")
  raise Refused("post and description longer than the persona's region")
