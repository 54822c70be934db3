"""config.json in a workdir: what made the run, so that nothing else goes on with it."""

import functools
import hashlib
import json
import re
from importlib.metadata import version
from pathlib import Path
from typing import Any

from flax.traverse_util import flatten_dict

from alignx_jax.files import write_text

# What may differ between a run and its resumption or evaluation: how, not what, is done.
_FREE = re.compile(
  r"(eval|judge|study|baselines)\..*|mesh\..*|model\.(attention\w*|remat|preset)"
  r"|reference\.directory|data\.workers"
  r"|train\.(devices|head_chunk|keep\w*|\w+_every|may_differ|restore|profile|spike\w*|\w*skipped"
  r"|log_text|barrier_seconds)"
)


def save_run_config(config: Any, workdir: Path, fingerprint: str) -> None:
  """Writes config.json.

  Args:
    fingerprint: of the data and the base model, see reference.cache_key.
  """
  text = json.dumps(config.to_dict() | {"fingerprint": fingerprint}, indent=2)
  write_text(workdir / "config.json", text + "\n")


def run_record(config: Any, fingerprint: str, formatting) -> dict:
  """What made a run, as a checkpoint keeps it: JSON of plain values."""
  record = {
    "config": config.to_dict() | {"fingerprint": fingerprint},
    "tokenizer": formatting.tokenizer.fingerprint,
    "space": json.loads(formatting.space_of_bridge.to_json()),
    "version": code_version(),
  }
  return json.loads(json.dumps(record))


@functools.cache
def code_version() -> str:
  """The package's version, and a hash of its modules."""
  root = Path(__file__).parents[1]
  digest = hashlib.sha256()
  for path in sorted(root.rglob("*.py")):
    digest.update(f"{path.relative_to(root)} ".encode() + path.read_bytes())
  return f"{version('alignx_jax')} {digest.hexdigest()[:12]}"


def check_run_config(config: Any, workdir: Path, fingerprint: str) -> None:
  """check_config of the config.json in a workdir.

  Raises:
    FileNotFoundError: there is none.
  """
  path = workdir / "config.json"
  if not path.exists():
    raise FileNotFoundError(f"{path} does not exist, though {workdir} has a checkpoint.")
  check_config(config, _read(path), str(workdir), fingerprint)


def check_config(config: Any, found: dict, where: str, fingerprint: str) -> None:
  """Compares a config with the one that made a run.

  Args:
    found: that, as save_run_config writes it.
  Raises:
    ValueError: another config, other data or another base made the run; names the fields, but
      for those that config.train.may_differ names.
  """
  old = flatten_dict(found, sep=".")
  now = config.to_dict() | {"fingerprint": fingerprint}
  now = flatten_dict(json.loads(json.dumps(now)), sep=".")

  def differs(name):
    # A field that the run's version had not yet changes nothing while it is off.
    off = name not in old and not now[name]
    return old.get(name) != now.get(name) and not off and not _FREE.fullmatch(name)

  changed = {
    name: f"{name} was {old.get(name)!r} and is {now.get(name)!r}"
    for name in sorted(old.keys() | now.keys())
    if differs(name) and name not in config.train.may_differ
  }
  if not changed:
    return
  told = "; ".join(changed.values())
  if list(changed) == ["fingerprint"]:
    told = "the records, the tokenizer or the base model's weights have changed"
  raise ValueError(
    f"{where} holds a run with another config: {told}. Use another --workdir, or name what may "
    f"differ: --config.train.may_differ={tuple(changed)!r}."
  )


def run_config(base: Any, workdir: Path) -> Any:
  """The config of a run, from the config.json that it left in its workdir.

  Args:
    base: a config with the fields there are, which says how things are done (_FREE); it is not
      changed.
  Raises:
    FileNotFoundError: there is none.
    ValueError: it is damaged, or has fields that there are not.
  """
  path = workdir / "config.json"
  if not path.exists():
    raise FileNotFoundError(f"{workdir} holds no run (no config.json); train there first.")
  found = _read(path)
  del found["fingerprint"]
  config = base.copy_and_resolve_references()
  try:
    fields = flatten_dict(found, sep=".")
    # A preset says how the weights are checked, and belongs to them.
    kept = {n: v for n, v in fields.items() if not _FREE.fullmatch(n) or n == "model.preset"}
    config.update_from_flattened_dict(kept)
  except (AttributeError, KeyError, TypeError, ValueError) as error:
    raise ValueError(f"{path} is of another version or damaged: {error}") from error
  return config


def _read(path: Path) -> dict:
  try:
    found = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(found, dict) or "fingerprint" not in found:
      raise ValueError("not what a run writes")
    return found
  except ValueError as error:
    raise ValueError(
      f"{path} is damaged ({error}); run its training command again, which restores it from the "
      "newest checkpoint."
    ) from error
