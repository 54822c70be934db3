"""logs/host_INDEX.jsonl: what happened to a run and when, an object a line, by each process."""

import json
import time
from pathlib import Path

from absl import logging


class EventLog:
  """Appends events; those that someone should see are warnings on the console too."""

  def __init__(self, workdir: Path, process: int):
    path = Path(workdir) / "logs" / f"host_{process}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    self._file = path.open("a", encoding="utf-8")

  def write(self, event: str, **fields) -> None:
    self._file.write(json.dumps({"time": time.time(), "event": event, **fields}) + "\n")
    self._file.flush()

  def warn(self, event: str, message: str, **fields) -> None:
    """Likewise, and says it on the console."""
    logging.warning("%s", message)
    self.write(event, message=message, **fields)

  def close(self) -> None:
    self._file.close()
