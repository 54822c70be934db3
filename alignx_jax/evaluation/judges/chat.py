"""One attempt at an OpenAI-compatible chat endpoint, with the standard library alone."""

import dataclasses
import datetime
import email.utils
import http.client
import json
import os
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from typing import NamedTuple

_MOST_BYTES = 1_000_000  # of a reply
_PASSING = (408, 409, 425, 429, 500, 502, 503, 504, 529)  # may go well another time


class Reply(NamedTuple):
  """What a model said; tokens are None where the endpoint does not count them."""

  text: str
  is_cut: bool
  tokens_in: int | None
  tokens_out: int | None


class ChatError(Exception):
  """No reply.

  Attributes:
    kind: "retry", may go well another time; "once", this request is refused; "always", so will
      every other be.
    retry_after: seconds that the endpoint asks to wait, or None.
    is_billed: whether the endpoint may have charged for it.
  """

  def __init__(self, reason: str, kind: str, *, retry_after=None, is_billed: bool = False):
    super().__init__(reason)
    self.kind, self.retry_after, self.is_billed = kind, retry_after, is_billed


class _NoRedirect(urllib.request.HTTPRedirectHandler):
  """A redirection would take the key to another host."""

  def redirect_request(self, *_):
    return None


_OPENER = urllib.request.build_opener(_NoRedirect)


@dataclasses.dataclass(frozen=True)
class Chat:
  """An endpoint.

  Attributes:
    url: up to and with /v1.
    key: sent as a bearer token if not empty; never shown.
    timeout: seconds for the whole of one attempt.
    max_tokens: the most of a reply.
  """

  url: str
  model: str
  key: str = dataclasses.field(default="", repr=False)
  timeout: float = 60.0
  max_tokens: int = 16

  def body(self, messages: Sequence[dict]) -> bytes:
    """The request, always the same for the same messages."""
    fields = {"temperature": 0, "max_tokens": self.max_tokens, "messages": list(messages)}
    return json.dumps({"model": self.model} | fields).encode()

  def ask(self, body: bytes) -> Reply:
    """One attempt.

    Raises:
      ChatError: there is no reply.
    """
    headers = {"Content-Type": "application/json", "User-Agent": "alignx_jax"}
    if self.key:
      headers["Authorization"] = f"Bearer {self.key}"
    request = urllib.request.Request(f"{self.url}/chat/completions", body, headers, method="POST")
    deadline = time.monotonic() + self.timeout
    try:
      with _OPENER.open(request, timeout=self.timeout) as response:
        return _reply(_read(response, deadline))
    except urllib.error.HTTPError as error:
      with error:
        raise self._refusal(error, deadline) from None
    except TimeoutError:
      reason = f"no reply within {self.timeout:g} s"
    except urllib.error.URLError as error:
      if not isinstance(error.reason, TimeoutError):
        raise ChatError(f"the endpoint cannot be reached ({error.reason})", "retry") from None
      reason = f"no reply within {self.timeout:g} s"
    except (OSError, http.client.HTTPException) as error:
      reason = f"the connection broke ({type(error).__name__})"
    raise ChatError(reason, "retry", is_billed=True)

  def _refusal(self, error: urllib.error.HTTPError, deadline: float) -> ChatError:
    reason = f"HTTP {error.code}"
    if error.code in (401, 403):
      # What it says may quote the key.
      return ChatError(f"{reason}: the endpoint does not accept the API key", "always")
    if error.code in _PASSING:
      return ChatError(reason, "retry", retry_after=_seconds(error.headers.get("Retry-After")))
    if error.code == 404 or 300 <= error.code < 400:
      said = f"no chat endpoint at {self.url}, or no model {self.model!r}"
      return ChatError(f"{reason}: {said}; check config.judge.url and .model", "always")
    try:
      said = " ".join(_read(error, deadline).decode("utf-8", "replace").split())[:200]
    except (OSError, ChatError, http.client.HTTPException):
      said = ""
    if self.key:
      said = said.replace(self.key, "…")
    return ChatError(f"{reason}: {said}".removesuffix(": "), "once")


def key_from(variable: str) -> str:
  """The API key that an environment variable holds; "" where it is not set.

  Raises:
    ValueError: it can be no key; does not show it.
  """
  key = os.environ.get(variable, "").strip()
  if not key.isascii() or not key.isprintable() or " " in key:
    raise ValueError(
      f"The environment variable {variable} holds spaces or characters that no API key has; set it "
      "to the key alone."
    )
  return key


def _read(response, deadline: float) -> bytes:
  """All of a body, before the deadline however slowly it comes."""
  parts, size = [], 0
  while part := response.read1(65536):
    parts.append(part)
    size += len(part)
    if time.monotonic() > deadline:
      raise TimeoutError
    if size > _MOST_BYTES:
      reason = f"a reply of more than {_MOST_BYTES:,} bytes"
      raise ChatError(reason, "once", is_billed=True)
  return b"".join(parts)


def _reply(body: bytes) -> Reply:
  """Reads a chat completion."""
  try:
    found = json.loads(body)
    choice = found["choices"][0]
    text = choice["message"]["content"]
    usage = found.get("usage") or {}
    tokens = [usage.get(name) for name in ("prompt_tokens", "completion_tokens")]
    if not isinstance(text, str | None):
      raise TypeError(type(text).__name__)
  except (ValueError, KeyError, IndexError, TypeError, AttributeError, RecursionError):
    reason = "what the endpoint sent is no chat completion"
    raise ChatError(reason, "retry", is_billed=True) from None
  tokens = [n if isinstance(n, int) and n >= 0 else None for n in tokens]
  return Reply(text or "", choice.get("finish_reason") == "length", *tokens)


def _seconds(retry_after: str | None) -> float | None:
  """A Retry-After header, of seconds or a date, as seconds from now."""
  if not retry_after:
    return None
  try:
    return max(0.0, float(retry_after))
  except ValueError:
    pass
  try:
    then = email.utils.parsedate_to_datetime(retry_after)
    return max(0.0, (then - datetime.datetime.now(datetime.UTC)).total_seconds())
  except (ValueError, TypeError):
    return None
