"""A trained preference bridge from its workdir."""

import json
from pathlib import Path

import jax
from ml_collections import ConfigDict

from alignx_jax.experiments import experiment as experiments
from alignx_jax.experiments import loading
from alignx_jax.experiments.bridges import CALIBRATION
from alignx_jax.experiments.config_checks import has_head
from alignx_jax.files import as_path
from alignx_jax.inference.preference_model import PreferenceModel
from alignx_jax.personas.preferences import PreferenceSpace
from alignx_jax.training import mesh as meshes
from alignx_jax.training.bridge import SPACE


def load_preference_model(workdir: str | Path, *, platform: str | None = None) -> PreferenceModel:
  """The newest checkpoint of a run with a learned bridge, on this machine's devices.

  No data is read. The base is not checked: where the run trained an adapter or the bridge alone,
  config.model.weights, or the run that config.bridge.start names, must still be as it began.

  Args:
    workdir: of a run with config.objective.name "pba" and config.bridge.kind "head", such as
      "runs/study/pba_head".
    platform: "cpu", "gpu" or "tpu"; None for the best there is.
  Raises:
    FileNotFoundError: there is no such run, it has no checkpoint, or the weights are not there.
    ValueError: the run has no learned bridge, or its space is no longer the one that its config
      names.
  """
  workdir = as_path(workdir)
  config = _saved_config(workdir)
  if "bridge" not in config or not has_head(config):
    raise ValueError(
      f"{workdir} is no run with a learned bridge: train one with config.objective.name 'pba' and "
      "config.bridge.kind 'head', and give its workdir."
    )
  space = _saved_space(workdir, config)
  mesh = meshes.make_mesh(devices=jax.local_devices(backend=platform))
  tokenizer, model = loading.load_tokenizer_and_model(
    config, platform=mesh.devices.flat[0].platform, dimensions=len(space)
  )
  config.bridge.space = ""  # the run's own copy counts, here in the place of the data's
  formatting = loading.make_formatting(config, tokenizer, space)
  experiment = experiments.Experiment(config, model, mesh, formatting, (), (), (), workdir)
  params = experiments.restored_params(experiment)
  return PreferenceModel.of(experiment, params, temperature=_saved_temperature(workdir))


def _saved_config(workdir: Path) -> ConfigDict:
  path = workdir / "config.json"
  if not path.exists():
    raise FileNotFoundError(
      f"{workdir} holds no run (no config.json); give the workdir that a run was trained in."
    )
  return ConfigDict(json.loads(path.read_text(encoding="utf-8")))


def _saved_space(workdir: Path, config: ConfigDict) -> PreferenceSpace:
  """The dimensions of the run's head, which must be those that the config names, if still there."""
  if not (path := workdir / SPACE).exists():
    raise FileNotFoundError(f"{path} does not exist; train in {workdir} again, which writes it.")
  saved = PreferenceSpace.from_json(path)
  if config.bridge.space:
    sources = [config.bridge.space]
  else:
    sources = [source for source in (config.data.path, config.data.space) if source]
  if all(source == "simulated" or Path(source).exists() for source in sources):
    in_use = loading.bridge_space(config) or loading.data_space(config)
    in_use.check_same(saved, "The saved head")
  return saved


def _saved_temperature(workdir: Path) -> float:
  """As it was fitted; 1 if it was not."""
  if not (path := workdir / CALIBRATION).exists():
    return 1.0
  try:
    return float(json.loads(path.read_text(encoding="utf-8"))["temperature"])
  except (ValueError, KeyError, TypeError) as error:
    raise ValueError(
      f'{path} is not {{"temperature": T}} ({error}); delete it and evaluate the run again.'
    ) from error
