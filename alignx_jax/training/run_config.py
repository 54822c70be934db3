"""config.json in a workdir: what made the run, so that nothing else goes on with it."""

import json
import re
from pathlib import Path
from typing import Any

from flax.traverse_util import flatten_dict

# What may differ between a run and its resumption or evaluation: how, not what, is done.
_FREE = re.compile(
  r"eval\..*|mesh\..*|model\.(attention\w*|remat|preset)|reference\.directory|data\.workers"
  r"|train\.(devices|head_chunk|keep_checkpoints|\w+_every)"
)


def save_run_config(config: Any, workdir: Path, fingerprint: str) -> None:
  """Writes config.json.

  Args:
    fingerprint: of the data and the base model, see reference.cache_key.
  """
  text = json.dumps(config.to_dict() | {"fingerprint": fingerprint}, indent=2)
  (workdir / "config.json").write_text(text + "\n", encoding="utf-8")


def check_run_config(config: Any, workdir: Path, fingerprint: str) -> None:
  """Compares with config.json.

  Raises:
    FileNotFoundError: there is none.
    ValueError: another config, other data or another base made the run; names the fields.
  """
  path = workdir / "config.json"
  if not path.exists():
    raise FileNotFoundError(f"{path} does not exist, though {workdir} has a checkpoint.")
  old = flatten_dict(json.loads(path.read_text(encoding="utf-8")), sep=".")
  now = config.to_dict() | {"fingerprint": fingerprint}
  now = flatten_dict(json.loads(json.dumps(now)), sep=".")
  changed = [
    f"{name} was {old.get(name)!r} and is {now.get(name)!r}"
    for name in sorted(old.keys() | now.keys())
    if old.get(name) != now.get(name) and not _FREE.fullmatch(name)
  ]
  if not changed:
    return
  if changed[0].startswith("fingerprint") and len(changed) == 1:
    changed = ["the records or the base model's weights have changed"]
  raise ValueError(
    f"{workdir} holds a run with another config: {'; '.join(changed)}. Use another --workdir."
  )


def run_config(base: Any, workdir: Path) -> Any:
  """The config of a run, from the config.json that it left in its workdir.

  Args:
    base: a config with the fields there are; it is not changed.
  Raises:
    FileNotFoundError: there is none.
  """
  path = workdir / "config.json"
  if not path.exists():
    raise FileNotFoundError(f"{workdir} holds no run (no config.json); train there first.")
  found = json.loads(path.read_text(encoding="utf-8"))
  del found["fingerprint"]
  config = base.copy_and_resolve_references()
  config.update_from_flattened_dict(flatten_dict(found, sep="."))
  return config
