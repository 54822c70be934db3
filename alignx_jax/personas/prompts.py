"""Prompts as lists of (text, kind) pieces, so that user text is never parsed as template.

A prompt is a chat format (a model's turn markers) around a prompt format (what is said
of the user). Both are data: `chat_formats.json` and `prompt_formats.json`, where `{name}`
is a place to fill.
"""

import functools
import json
import re
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np

from alignx_jax.personas.persona import HistoryItem, Persona, UserComment


class Piece(NamedTuple):
  """A stretch of a prompt. Special tokens are recognised in template pieces only."""

  text: str
  kind: Literal["template", "user"]


def fill(template: str, **values: str | list[Piece]) -> list[Piece]:
  """A template's pieces; a string value is user text, a list of pieces stands as it is."""
  pieces = []
  for i, part in enumerate(re.split(r"\{(\w+)\}", template)):
    if i % 2 == 0:
      pieces += [Piece(part, "template")] if part else []
    elif isinstance(value := values[part], str):
      pieces += [Piece(value, "user")] if value else []
    else:
      pieces += value
  return pieces


def text_of(pieces: list[Piece]) -> str:
  """The whole text, for people and for comparison with the release."""
  return "".join(piece.text for piece in pieces)


@functools.cache
def _formats(file: str) -> dict:
  return json.loads(Path(__file__).with_name(file).read_text(encoding="utf-8"))


def _lookup(file: str, kind: str, name: str) -> dict:
  formats = _formats(file)
  if name not in formats:
    raise ValueError(f"No {kind} format {name!r}. There are: {', '.join(formats)}.")
  return formats[name]


def chat_format(name: str) -> dict:
  """A chat format by name; ValueError lists the names when there is none."""
  return _lookup("chat_formats.json", "chat", name)


def prompt_format(name: str) -> dict:
  """A prompt format by name; ValueError lists the names when there is none."""
  return _lookup("prompt_formats.json", "prompt", name)


def render_prompt(
  post: str,
  *,
  chat: str,
  prompt: str,
  persona: Persona | None = None,
  profile: str | None = None,
) -> list[Piece]:
  """The pieces of every token before the response.

  Args:
    post: the post x.
    chat: name of the chat format, e.g. "chatml".
    prompt: name of the prompt format, e.g. "default".
    persona: shown for in-context alignment, π(y | x, P).
    profile: shown for preference-bridged alignment, π(y | x, P̃). With neither, the
      prompt is the unconditioned one, π(y | x).
  Raises:
    ValueError: both a persona and a profile, or an unknown format.
  """
  if persona is not None and profile is not None:
    raise ValueError("A prompt shows a persona (ICA) or a profile (PBA), not both.")
  form = prompt_format(prompt)
  if profile is not None:
    part, values = form["pba"], {"profile": profile}
  elif persona is not None:
    part, values = form["ica"], _persona_pieces(persona, form)
  else:
    part, values = form["none"], {}
  return fill(
    chat_format(chat)["prompt"],
    system=[Piece(part["system"], "template")],
    user=fill(part["user"], post=post, **values),
  )


def render_response(response: str, *, chat: str, prompt: str) -> list[Piece]:
  """The pieces of the response with the end-of-turn marker the model learns to emit."""
  if prompt_format(prompt).get("strip_response_newlines"):
    response = response.rstrip("\n")
  return fill(chat_format(chat)["response"], response=response) + [
    Piece(prompt_format(prompt).get("before_end", ""), "template"),
    Piece(chat_format(chat)["end"], "template"),
  ]


class Part(NamedTuple):
  """A text of a persona that a learned bridge reads by itself.

  Attributes:
    kind: index in PART_KINDS.
    directions: preference directions [P] of the act it is of, where they are known.
  """

  pieces: list[Piece]
  kind: int
  directions: np.ndarray | None = None


# What a learned bridge reads of each kind. It is told the kind beside the text.
_PART_FORMATS = {
  "post": "Post: {post}",
  "written": "Post: {post}\nComment: {text}",
  "chosen": "Post: {post}\nComment: {text}",
  "rejected": "Comment: {text}",
  "description": "About the user: {text}",
}
PART_KINDS = tuple(_PART_FORMATS)


def render_parts(post: str, persona: Persona) -> list[Part]:
  """The parts of a persona: the post, what the user wrote, chose and rejected, and is."""

  def part(kind, directions=None, **texts):
    return Part(fill(_PART_FORMATS[kind], **texts), PART_KINDS.index(kind), directions)

  parts = [part("post", post=post)] if post else []
  for act in persona.history:
    parts += act_parts(act)
  if persona.description:
    parts.append(part("description", text=persona.description))
  return parts


def act_parts(act: HistoryItem) -> list[Part]:
  """The parts of one act."""

  def part(kind, text):
    pieces = fill(_PART_FORMATS[kind], post=act.post, text=text)
    return Part(pieces, PART_KINDS.index(kind), act.directions)

  if isinstance(act, UserComment):
    return [part("written", act.comment)]
  return [part("chosen", act.chosen), part("rejected", act.rejected)]


def _persona_pieces(persona: Persona, form: dict) -> dict[str, list[Piece]]:
  def section(name, items):
    if not items:
      return []
    pieces = [Piece(form[name]["heading"], "template")]
    for number, item in enumerate(items, start=1):
      texts = {"post": item.post, "number": [Piece(str(number), "template")]}
      if isinstance(item, UserComment):
        texts["comment"] = item.comment
      else:
        texts |= {"chosen": item.chosen, "rejected": item.rejected}
      pieces += fill(form[name]["item"], **texts)
    return pieces

  description = (
    fill(form["description"], description=persona.description) if persona.description else []
  )
  return {
    "comments": section("comments", persona.comments),
    "pairs": section("pairs", persona.pairs),
    "description": description,
  }
