"""Replies of an endpoint on disk: what was paid for once is not asked again."""

import json
import threading
from pathlib import Path

from absl import logging

from alignx_jax.files import write_text


class ReplyCache:
  """A JSONL file of what was asked, by key, and what it cost.

  A line is {"key", "cost", "reply"}, or "failure" in place of "reply" where an attempt that failed
  may have been charged for. A last line that a kill cut short is removed; a line that is no such
  thing is told of and passed over.
  """

  def __init__(self, path: Path):
    self._path, self._lock = path, threading.Lock()
    self._replies: dict[str, str] = {}
    self.spent = 0.0
    if not path.exists():
      path.parent.mkdir(parents=True, exist_ok=True)
      return
    text = path.read_text(encoding="utf-8", errors="replace")
    whole = text[: text.rfind("\n") + 1]
    if whole != text:
      write_text(path, whole)
    for number, line in enumerate(whole.split("\n")[:-1], start=1):
      try:
        found = json.loads(line)
        cost, key, reply = float(found["cost"]), found["key"], found.get("reply")
        if not 0 <= cost < float("inf") or not isinstance(key, str):
          raise ValueError("no such cost or key")
      except (ValueError, KeyError, TypeError, AttributeError) as error:
        logging.warning("%s:%d is no reply (%r): passed over and asked again.", path, number, error)
        continue
      self.spent += cost
      if isinstance(reply, str):
        self._replies[key] = reply

  def get(self, key: str) -> str | None:
    """The reply, or None."""
    return self._replies.get(key)

  def add(self, key: str, cost: float, *, reply: str | None = None, failure: str = "") -> None:
    """Appends what was said, or why an attempt that may have cost something failed."""
    line = {"key": key, "cost": round(cost, 9)}
    line |= {"failure": failure} if reply is None else {"reply": reply}
    with self._lock, self._path.open("a", encoding="utf-8") as file:
      file.write(json.dumps(line) + "\n")
      if reply is not None:
        self._replies[key] = reply
