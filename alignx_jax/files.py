"""Files that are either old or new, never half written."""

import os
from pathlib import Path


def write_text(path, text):
  """Writes beside `path`, then renames: a reader sees the old file or the new one whole."""
  path = Path(path)
  path.parent.mkdir(parents=True, exist_ok=True)
  temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
  try:
    # User text may hold lone surrogates, which UTF-8 cannot.
    temporary.write_text(text, encoding="utf-8", errors="xmlcharrefreplace")
    os.replace(temporary, path)
  finally:
    temporary.unlink(missing_ok=True)
