"""Files that are either old or new, never half written; here or on an object store."""

import os
from pathlib import Path


def is_remote(path) -> bool:
  """Whether this is a URL, such as gs://bucket/run."""
  return "://" in os.fspath(path)


def as_path(path):
  """A pathlib.Path; of a URL what etils.epath has in its place."""
  if not is_remote(path):
    return Path(path)
  from etils import epath

  return epath.Path(path)


def write_text(path, text):
  """Writes beside `path`, then renames: a reader sees the old file or the new one whole."""
  path = as_path(path)
  # User text may hold lone surrogates, which UTF-8 cannot.
  body = text.encode("utf-8", errors="xmlcharrefreplace")
  if is_remote(path):
    path.write_bytes(body)  # objects appear whole
    return
  path.parent.mkdir(parents=True, exist_ok=True)
  temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
  try:
    temporary.write_bytes(body)
    os.replace(temporary, path)
  finally:
    temporary.unlink(missing_ok=True)


def move(source, target):
  """A directory to another place, with its folders; of an object store every object is copied."""
  source, target = as_path(source), as_path(target)
  if not is_remote(source):
    target.parent.mkdir(parents=True, exist_ok=True)
    source.rename(target)
    return

  def copy(folder, to):
    for path in folder.iterdir():
      if path.is_dir():
        copy(path, to / path.name)
      else:
        path.copy(to / path.name)

  copy(source, target)
  source.rmtree()  # only now: cut off before, it is whole
