"""From an example to token ids: the condition it states, the prompt, its three parts."""

import dataclasses
from typing import Any

from alignx_jax.data.records import Example
from alignx_jax.data.rows import Regions, Tokenised
from alignx_jax.data.tokenizers import Tokenizer
from alignx_jax.personas.persona import HistoryPolicy, Persona
from alignx_jax.personas.preferences import PreferenceSpace
from alignx_jax.personas.prompts import (
  chat_format,
  prompt_format,
  render_prompt,
  render_response,
)

CONDITIONS = ("persona", "inferred", "golden", "none")


class Refused(Exception):
  """An example that cannot be used; the message is the reason, the same for all of a kind."""


@dataclasses.dataclass(frozen=True)
class Formatting:
  """How an example becomes token ids.

  Attributes:
    chat, prompt: names of the chat and prompt formats (personas/prompts.py).
    condition: what the policy is conditioned on: the raw `persona` (ICA), P̃ `inferred`
      from the history or `golden` from the record's label (PBA), or `none`.
    history: which parts of a persona the prompt shows.
  """

  tokenizer: Tokenizer
  space: PreferenceSpace
  regions: Regions
  chat: str
  prompt: str
  condition: str
  history: HistoryPolicy = HistoryPolicy()

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


def condition_of(example: Example, persona: Persona, formatting: Formatting) -> dict[str, Any]:
  """The keyword of render_prompt that states the condition."""
  if formatting.condition == "persona":
    return {"persona": persona}
  if formatting.condition == "inferred":
    return {"profile": infer_profile(example, persona, formatting.space)}
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
  condition = condition_of(example, persona, formatting)
  for dropped in range(len(persona.history) + 1):
    ids = tokenizer.encode_pieces(render_prompt(example.post, **names, **condition))
    if formatting.bos:
      ids = [tokenizer.bos_id, *ids]
    # The last token of the context moves to the responses.
    if len(ids) - 1 <= regions.context:
      return Tokenised(ids, *responses, dropped)
    if "persona" not in condition:
      break
    newest_first = formatting.history.order == "reversed"
    condition = {"persona": condition["persona"].drop_oldest(newest_first=newest_first)}
  raise Refused("context longer than its region")
