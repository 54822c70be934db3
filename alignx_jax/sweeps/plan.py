"""A sweep file and its config to the trials of a workdir, all checked before any runs."""

import dataclasses
import importlib.util
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flax.traverse_util import flatten_dict
from ml_collections import ConfigDict

from alignx_jax.experiments.config_checks import check_names
from alignx_jax.files import is_remote, write_text
from alignx_jax.sweeps.space import Trial

_NAME = re.compile(r"[A-Za-z0-9._=,+-]{1,120}")


@dataclasses.dataclass(frozen=True)
class Planned:
  """A trial and its whole config.

  Attributes:
    factors: what the tables and pictures compare.
    workdir: of its run.
  """

  name: str
  overrides: Mapping[str, Any]
  factors: Mapping[str, Any]
  config: ConfigDict
  workdir: Path


def make_plan(path: str | Path, config: ConfigDict, workdir: Path) -> list[Planned]:
  """The trials of a sweep file, in its order.

  Args:
    config: the file's own, with what the command line overrides; its `sweep` is not theirs.
    workdir: of the sweep.
  Raises:
    ValueError: the file, a trial or a field is at fault, or the workdir holds another sweep;
      says which and what to do.
  """
  if is_remote(workdir):
    raise ValueError(
      f"--workdir is {workdir}; set it to a folder that all computers of the sweep see."
    )
  trials = read_sweep(path)
  base = config.copy_and_resolve_references()
  with base.unlocked():
    if "sweep" in base:
      del base["sweep"]
  if base.reference.kind == "cached" and not base.reference.directory:
    base.reference.directory = str(Path(workdir).absolute() / "cache" / "reference")
  return [
    Planned(
      trial.name,
      dict(trial.overrides),
      dict(trial.factors or trial.overrides),
      _config(path, trial, base),
      Path(workdir).absolute() / "trials" / trial.name,
    )
    for trial in trials
  ]


def read_sweep(path: str | Path) -> list[Trial]:
  """What get_sweep() of a file yields.

  Raises:
    ValueError: it cannot be run, or names are not fit or not different.
  """
  get_sweep = getattr(_module(path), "get_sweep", None)
  if not callable(get_sweep):
    raise ValueError(
      f"{path} has no get_sweep(); write one that yields trials, as configs/sweeps/beta.py does."
    )
  try:
    trials = list(get_sweep())
  except Exception as error:
    raise ValueError(f"get_sweep() of {path} fails: {type(error).__name__}: {error}") from error
  seen = set()
  for i, trial in enumerate(trials):
    if not isinstance(trial, Trial) or not isinstance(trial.overrides, Mapping):
      raise ValueError(
        f"get_sweep() of {path} yields {trial!r} as number {i}; yield a Trial, such as "
        "alignx_jax.sweeps.space.trial({'objective.beta': 0.1})."
      )
    if not _NAME.fullmatch(trial.name) or not trial.name.strip("."):
      raise ValueError(
        f"{path}: the trial's name {trial.name!r} cannot be a folder's; use up to 120 letters, "
        "digits and . _ = , + -."
      )
    if trial.name in seen:
      raise ValueError(
        f"{path} yields two trials of the name {trial.name!r}; name them by all that they differ "
        "in, or leave one out."
      )
    seen.add(trial.name)
  if not trials:
    raise ValueError(f"get_sweep() of {path} yields no trial.")
  return trials


def _module(path):
  spec = importlib.util.spec_from_file_location("sweep_file", path)
  module = importlib.util.module_from_spec(spec)
  try:
    spec.loader.exec_module(module)
  except Exception as error:
    raise ValueError(f"{path} cannot be imported: {type(error).__name__}: {error}") from error
  return module


def _config(path, trial: Trial, base: ConfigDict) -> ConfigDict:
  config = base.copy_and_resolve_references()
  known = flatten_dict(base.to_dict(), sep=".")
  for field, value in trial.overrides.items():
    where = f"{path}, trial {trial.name!r}"
    if field not in known:
      raise ValueError(
        f"{where}: there is no config field {field!r}; all fields are in configs/base.py."
      )
    try:
      config.update_from_flattened_dict({field: value})
    except (TypeError, ValueError) as error:
      kind = type(known[field]).__name__
      raise ValueError(f"{where}: config.{field} is {value!r}; give a {kind}.") from error
  try:
    check_names(config)
  except ValueError as error:
    raise ValueError(f"{where}: {error}") from error
  return config.lock()


# ------------------------------------------------------------------ what a workdir holds


def check_unchanged(plan: list[Planned], workdir: Path) -> None:
  """Compares the trials with those of the same names that were run in a workdir.

  Raises:
    ValueError: some had another config; names the fields of the first.
  """
  path = Path(workdir) / "sweep.json"
  if not path.exists():
    return
  try:
    before = json.loads(path.read_text(encoding="utf-8"))
  except ValueError as error:
    raise ValueError(f"{path} is damaged ({error}); remove it, or use another --workdir.") from None
  for trial in plan:
    old = before.get(trial.name)
    now = _flat(trial.config)
    if old is None or old == now or not trial.workdir.exists():
      continue
    changed = "; ".join(
      f"{field} was {old.get(field)!r} and is {now.get(field)!r}"
      for field in sorted(old.keys() | now.keys())
      if old.get(field) != now.get(field)
    )
    raise ValueError(
      f"Trial {trial.name!r} in {workdir} was run with another config: {changed}. Use another "
      f"--workdir, or remove {trial.workdir} to run it anew."
    )


def save_plan(plan: list[Planned], workdir: Path) -> list[str]:
  """Writes sweep.json: the config of each trial there ever was in a workdir.

  Returns:
    Names of those that have been run and are no part of the plan any more.
  """
  path = Path(workdir) / "sweep.json"
  before = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
  now = {trial.name: _flat(trial.config) for trial in plan}
  write_text(path, json.dumps(before | now, indent=1) + "\n")
  others = before.keys() - now.keys()
  return sorted(name for name in others if (path.parent / "trials" / name).exists())


def _flat(config) -> dict:
  """Fields and values as JSON has them, without the place of the sweep's own cache."""
  flat = flatten_dict(json.loads(json.dumps(config.to_dict())), sep=".")
  flat.pop("reference.directory")
  return flat
