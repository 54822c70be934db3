"""What a config stands for: model, data and formatting; trained and evaluated."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import jax
from flax import nnx
from jax.sharding import Mesh

from alignx_jax.ahead import flops
from alignx_jax.ahead.chips import peak_flops
from alignx_jax.data.formatting import Formatting
from alignx_jax.data.groups import count_groups
from alignx_jax.data.loader import PACKING, Loader
from alignx_jax.data.prepared import PreparedExamples
from alignx_jax.data.records import Example, Profiled
from alignx_jax.data.splits import load_splits
from alignx_jax.data.stream import mixing_rates
from alignx_jax.experiments.config_checks import (
  check_names,
  check_sizes,
  check_start,
  has_head,
  has_latent,
  head_config,
)
from alignx_jax.experiments.loading import (
  abstract_model,
  bridge_dimensions,
  bridge_space,
  data_space,
  load_params,
  load_tokenizer_and_model,
  make_formatting,
  make_mesh,
)
from alignx_jax.files import as_path
from alignx_jax.models.decoder import Decoder
from alignx_jax.models.lora import merged_base, split_trainable
from alignx_jax.objectives.losses import reference_kind
from alignx_jax.personas.preferences import PreferenceSpace
from alignx_jax.training import mesh as meshes
from alignx_jax.training.bridge import SPACE, continue_bridge, label_sample, start_bridge
from alignx_jax.training.checkpoints import Checkpoints
from alignx_jax.training.loop import TrainResult, train
from alignx_jax.training.reference import cache_key, fingerprint
from alignx_jax.training.run_config import check_run_config
from alignx_jax.training.steps import count_dimensions, param_shapes


@dataclasses.dataclass(frozen=True)
class Experiment:
  """Everything that a config names, loaded.

  Attributes:
    model: the base, shapes alone: start of the policy and frozen reference.
    mesh: on which models lie.
    formatting: as the policy is trained.
    workdir: of the run that this is of, where that is needed.
  """

  config: object
  model: Decoder
  mesh: Mesh
  formatting: Formatting
  train: Sequence[Example]
  validation: Sequence[Example]
  test: Sequence[Example]
  workdir: Path | None = None

  def with_objective(
    self, name: str, *, bridge: str = "text", fields: Mapping[str, object] | None = None
  ) -> "Experiment":
    """The same base and data under another objective, for PBA with a bridge of this kind.

    Args:
      fields: of the config that have other values, nested.
    """
    config = self.config.copy_and_resolve_references()
    config.objective.name, config.bridge.kind = name, bridge
    config.update(fields or {})
    space, tokenizer = self.formatting.space, self.formatting.tokenizer
    formatting = make_formatting(config, tokenizer, space)
    platform = self.mesh.devices.flat[0].platform
    dimensions = bridge_dimensions(config, space)
    model = abstract_model(config, self.model.arch, platform=platform, dimensions=dimensions)
    return dataclasses.replace(self, config=config, model=model, formatting=formatting)

  def load_base(self) -> nnx.State:
    """Parameters of the base on the mesh, with an adapter that changes nothing if there is one.

    The base is config.model.weights; or what config.bridge.start trained, an adapter merged into
    its weights: the reference of the DPO loss is the model that training starts from. A learned
    bridge starts from the phrases of its space, or goes on from that run's. Read anew at each
    call: training gives them away.

    Raises:
      ValueError: config.bridge.start trained another architecture.
    """
    start, base = None, None
    if has_head(self.config) and self.config.bridge.start:
      start = self.of_run(self.config.bridge.start)
      if start.model.arch != self.model.arch:
        raise ValueError(
          f"config.bridge.start, {start.workdir}, trained another model than "
          f"{self.config.model.weights}; set config.model.weights to {start.config.model.weights}."
        )
      params = restored_params(start)
      base, bridge = merged_base(start.model, params), params["bridge"]
      del params
    params = load_params(self.config, self.model, self.mesh, base=base)
    if not has_head(self.config):
      return params
    labels_XP = label_sample(self.train, self.formatting)
    params = start_bridge(params, self.space, self.formatting.tokenizer, labels_XP)
    return continue_bridge(params, self.space, bridge, start.space) if start else params

  @property
  def space(self) -> PreferenceSpace:
    """The dimensions of the bridge, or of the records."""
    return self.formatting.space_of_bridge

  def of_run(self, workdir: str) -> "Experiment":
    """The experiment that made a run with a learned bridge, on this one's mesh and data.

    What it was is that run's: model, tokenizer, prompts, dimensions. How it is run is this one's:
    rows of an evaluation, attention.

    Raises:
      FileNotFoundError: there is no such run.
      ValueError: the run has no learned bridge.
    """
    config = head_config(self.config, as_path(workdir))
    saved = PreferenceSpace.from_json(as_path(workdir) / SPACE)
    config.bridge.space = ""  # the run's own copy counts, wherever the file is now
    tokenizer, model = load_tokenizer_and_model(
      config, platform=self.mesh.devices.flat[0].platform, dimensions=len(saved)
    )
    formatting = make_formatting(config, tokenizer, self.formatting.space)
    formatting = dataclasses.replace(formatting, bridge_space=saved)
    return dataclasses.replace(
      self, config=config, model=model, formatting=formatting, workdir=as_path(workdir)
    )


def load_experiment(config) -> Experiment:
  """Loads what a config names, all but the weights.

  Raises:
    FileNotFoundError, ValueError: what does not exist or fit, and the field to set.
  """
  check_names(config)
  mesh = make_mesh(config)
  check_sizes(config, mesh)
  space = data_space(config)
  check_start(config, bridge_space(config) or space)
  tokenizer, model = load_tokenizer_and_model(
    config,
    platform=mesh.devices.flat[0].platform,
    dimensions=bridge_dimensions(config, space),
  )
  meshes.param_shardings(nnx.state(model), mesh)  # raises where sizes do not divide
  splits = load_splits(config.data, space, seed=config.seed)
  formatting = make_formatting(config, tokenizer, space)
  return Experiment(config, model, mesh, formatting, **splits)


def run_training(
  experiment: Experiment,
  workdir: Path,
  *,
  evaluate: Callable[[nnx.State], float] | None = None,
) -> TrainResult:
  """Trains as the config says; again resumes.

  Args:
    evaluate: see loop.train.
  Raises:
    ValueError: the workdir has a bridge of another space.
  """
  if has_head(experiment.config):
    check_space(experiment, workdir)
  return train(
    experiment.config,
    workdir,
    model=experiment.model,
    load=experiment.load_base,
    mesh=experiment.mesh,
    loader=training_loader(experiment),
    evaluate=evaluate,
    ideal_seconds=_ideal_seconds(experiment),
  )


def _ideal_seconds(experiment: Experiment) -> float | None:
  """Of a training step of full rows at the peak of all devices; None where that is not known."""
  config, model = experiment.config, experiment.model
  peak = peak_flops(experiment.mesh.devices.flat[0])
  if peak is None or has_latent(config):  # whose encoder's FLOPs are not counted
    return None
  needed = flops.train_flops(
    model.arch,
    experiment.formatting.regions,
    config.train.rows,
    frozen=config.lora.rank > 0,
    online=reference_kind(config) == "online",
    bridge=flops.bridge_sizes(config, count_dimensions(model)),
  )
  return needed / (peak * experiment.mesh.devices.size)


def check_space(experiment: Experiment, workdir: Path) -> None:
  """Raises ValueError if the bridge that a workdir has is of another space."""
  if (path := workdir / SPACE).exists():
    experiment.space.check_same(PreferenceSpace.from_json(path), f"The bridge in {workdir}")


def training_loader(experiment: Experiment) -> Loader:
  """The stream of a config's training examples."""
  config, mixture = experiment.config, None
  if config.data.temperature != 1:
    examples = experiment.train
    if isinstance(examples, Profiled):
      examples = examples.examples  # the same in the same order
    if not isinstance(examples, PreparedExamples):
      raise ValueError(
        "config.data.temperature weighs the sources of a prepared set; set it to 1 or "
        "config.data.path to what alignx_jax.prepare_data wrote."
      )
    groups = list(examples.by_source().values())
    mixture = groups, mixing_rates([len(group) for group in groups], config.data.temperature)
  grouping = None
  if by := config.objective.groups:
    grouping = count_groups(experiment.train, by, experiment.formatting.space)
  return Loader(
    experiment.train,
    experiment.formatting,
    rows=config.train.rows,
    epochs=config.train.epochs,
    seed=config.seed,
    workers=config.data.workers,
    mixture=mixture,
    grouping=grouping,
  )


def trained_params(experiment: Experiment, workdir: Path) -> nnx.State:
  """All parameters of the newest good checkpoint of a run of this config.

  Raises:
    FileNotFoundError: there is none.
    ValueError: another config made the run, or its bridge is of another space.
  """
  _checkpoints(workdir)
  check_space(experiment, workdir)
  base = experiment.load_base()
  key = cache_key(training_loader(experiment), experiment.model, fingerprint(base))
  check_run_config(experiment.config, workdir, f"{key}-{PACKING}")
  del base  # room for what is restored
  return restored_params(dataclasses.replace(experiment, workdir=workdir))


def restored_params(experiment: Experiment, step: int | None = None) -> nnx.State:
  """All parameters of the newest good checkpoint of an experiment's workdir, or of a step's.

  Raises:
    FileNotFoundError: there is none.
  """
  checkpoints = _checkpoints(experiment.workdir)
  bridge = experiment.config.bridge
  trained, frozen = split_trainable(
    param_shapes(experiment.model, experiment.mesh), bridge_alone=bridge.alone
  )
  if jax.tree.leaves(frozen):
    # Without a start it is the weights alone, which need no data.
    load = lambda: load_params(experiment.config, experiment.model, experiment.mesh)
    base = experiment.load_base() if bridge.start else load()
    frozen = split_trainable(base, bridge_alone=bridge.alone)[1]
    del base  # room for what is restored
  found = checkpoints.newest_params(trained, only=step)
  if found is None:
    raise FileNotFoundError(f"{experiment.workdir} has no checkpoint of step {step} any more.")
  trained = found.state
  checkpoints.close()
  return nnx.merge_state(trained, frozen)


def _checkpoints(workdir: Path) -> Checkpoints:
  checkpoints = Checkpoints(workdir, keep=1)
  if not checkpoints.steps():
    raise FileNotFoundError(f"{workdir} has no checkpoint; train there first.")
  return checkpoints
