"""What a config stands for: model, data and formatting; trained and evaluated."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import jax
from flax import nnx
from jax.sharding import Mesh

from alignx_jax.ahead import flops
from alignx_jax.ahead.chips import peak_flops
from alignx_jax.config_checks import (
  check_names,
  check_sizes,
  check_start,
  has_head,
  has_latent,
  head_config,
)
from alignx_jax.data.formatting import Formatting
from alignx_jax.data.groups import count_groups
from alignx_jax.data.loader import PACKING, Loader
from alignx_jax.data.prepared import PreparedExamples, is_prepared, prepared_space
from alignx_jax.data.proposals import proposed_regions
from alignx_jax.data.records import Example, Profiled
from alignx_jax.data.rows import Regions
from alignx_jax.data.splits import load_splits
from alignx_jax.data.stream import mixing_rates
from alignx_jax.data.tokenizers import Tokenizer, find_file, load_tokenizer
from alignx_jax.files import as_path
from alignx_jax.models.bridge import BridgeParam, add_bridge
from alignx_jax.models.decoder import Decoder
from alignx_jax.models.latent import add_latent
from alignx_jax.models.lora import LoraParam, add_lora, merged_base, split_trainable
from alignx_jax.models.presets import Architecture, get_architecture
from alignx_jax.models.pretrained import load_decoder, read_architecture
from alignx_jax.objectives.losses import reference_kind
from alignx_jax.personas.persona import HistoryPolicy
from alignx_jax.personas.preferences import PreferenceSpace, alignx_space
from alignx_jax.training import mesh as meshes
from alignx_jax.training.bridge import SPACE, continue_bridge, label_sample, start_bridge
from alignx_jax.training.checkpoints import Checkpoints
from alignx_jax.training.loop import TrainResult, train
from alignx_jax.training.reference import cache_key, fingerprint
from alignx_jax.training.run_config import check_run_config
from alignx_jax.training.steps import count_dimensions, param_shapes

# The condition that each objective trains on, by its bridge where it has one.
CONDITIONS = {
  ("ica", "text"): "persona",
  ("ica", "head"): "persona",
  ("pba", "text"): "inferred",
  ("pba", "head"): "bridge",
  ("dpo", "text"): "none",
  ("dpo", "head"): "none",
  ("vpl", "text"): "latent",
  ("vpl", "head"): "latent",
}


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


def make_formatting(config, tokenizer: Tokenizer, space: PreferenceSpace) -> Formatting:
  """How a config's examples become token ids when its policy is trained."""
  formatting = Formatting(
    tokenizer=tokenizer,
    space=space,
    regions=configured_regions(config),
    chat=config.prompt.chat,
    prompt=config.prompt.format,
    condition=CONDITIONS[config.objective.name, config.bridge.kind],
    history=HistoryPolicy(**config.history),
    bridge_space=bridge_space(config) if has_head(config) else None,
  )
  return _with_regions(config, formatting)


def configured_regions(config) -> Regions:
  """The sizes that config.regions gives by hand."""
  sizes = config.regions
  if has_head(config) or has_latent(config):
    return Regions(sizes.prompt, sizes.response, sizes.examples, sizes.persona, sizes.parts)
  return Regions(sizes.context, sizes.response, sizes.examples)


def data_space(config) -> PreferenceSpace:
  """The dimensions that the directions of a config's records are of.

  Raises:
    ValueError: config.data.space is another than that of the data.
  """
  named = PreferenceSpace.from_json(config.data.space) if config.data.space else None
  own = None
  if is_prepared(config.data.path):
    own = prepared_space(config.data.path)
  elif config.data.path == "simulated":
    own = alignx_space()
  if named and own:
    own.check_same(named, "config.data.space")
  return own or named or alignx_space()


def bridge_space(config) -> PreferenceSpace | None:
  """The dimensions of a config's learned bridge; None if they are the data's."""
  return PreferenceSpace.from_json(config.bridge.space) if config.bridge.space else None


def bridge_dimensions(config, space: PreferenceSpace) -> int:
  """P of a config's learned bridge, given the data's space; 0 if it has none."""
  return len(bridge_space(config) or space) if has_head(config) else 0


def _with_regions(config, formatting: Formatting) -> Formatting:
  """The formatting with the proposed regions that config.regions.layout names, if any."""
  if not config.regions.layout or has_head(config) or has_latent(config):
    return formatting
  regions = proposed_regions(config.data.path, formatting, config.regions.layout)
  return dataclasses.replace(formatting, regions=regions)


def make_mesh(config) -> Mesh:
  """The devices that config.mesh and config.train.devices name.

  Raises:
    ValueError: there are not so many; names the field.
  """
  count = config.train.devices or jax.device_count()
  if count > jax.device_count():
    raise ValueError(f"config.train.devices is {count}; there are {jax.device_count()}.")
  if count < jax.device_count() and jax.process_count() > 1:
    raise ValueError(f"config.train.devices is {count}; several processes use all: set it to 0.")
  return meshes.make_mesh(config.mesh, jax.devices()[:count])


def abstract_model(config, arch, *, platform: str, dimensions: int = 0) -> Decoder:
  """A Decoder of shapes alone, as config.model and config.lora say.

  Args:
    platform: of the devices that it will run on.
    dimensions: of its learned bridge; 0 for none.
  """
  attention = config.model.attention
  if attention == "auto":
    attention = "splash" if platform == "tpu" else "dense"

  def make():
    model = Decoder(
      arch,
      rngs=nnx.Rngs(0),
      param_dtype=config.model.param_dtype,
      compute_dtype=config.model.compute_dtype,
      remat=config.model.remat,
      attention=attention,
      block=config.model.attention_block,
    )
    _add_parts(config, model, dimensions, seed=0)
    return model

  return nnx.eval_shape(make)


def _add_parts(config, model: Decoder, dimensions: int, *, seed: int) -> None:
  """Gives a model what a config trains beside it: an adapter, a bridge, a latent variable."""
  if config.lora.rank:
    add_lora(model, rank=config.lora.rank, alpha=config.lora.alpha, rngs=nnx.Rngs(seed + 1))
  if dimensions:
    add_bridge(model, dimensions, size=config.bridge.size, rngs=nnx.Rngs(seed + 2))
  if has_latent(config):
    sizes = {field: config.latent[field] for field in ("size", "tokens", "width")}
    add_latent(model, **sizes, rngs=nnx.Rngs(seed + 3))


def load_params(config, model: Decoder, mesh: Mesh, *, base: nnx.State | None = None) -> nnx.State:
  """Parameters of config.model.weights in the shapes of `model`, each shard on its device.

  Args:
    base: to be used instead of those weights.
  """
  options = {"param_dtype": config.model.param_dtype}

  def initial(what):
    """Some of the parameters as they are before training, made where they lie."""

    def make():
      model_ = Decoder(model.arch, rngs=nnx.Rngs(config.seed), **options)
      _add_parts(config, model_, count_dimensions(model), seed=config.seed)
      return what(nnx.state(model_))

    return jax.jit(make, out_shardings=what(meshes.param_shardings(nnx.state(model), mesh)))()

  weights = config.model.weights
  if base is not None:
    base = jax.tree.map(lambda x: x.astype(config.model.param_dtype), base)
  elif weights.startswith("preset:"):
    return initial(lambda state: state)
  else:
    shardings = lambda params: meshes.param_shardings(params, mesh)
    base = nnx.state(load_decoder(find_file(weights), shardings=shardings, **options))
  if not (config.lora.rank or count_dimensions(model) or has_latent(config)):
    return base
  beside = lambda state: nnx.split_state(state, (LoraParam, BridgeParam), ...)[0]
  return nnx.merge_state(base, initial(beside))


def architecture(config, *, weights: bool = False) -> Architecture:
  """The architecture of config.model, by config.model.preset or from the weights' files.

  Args:
    weights: look at the weights' files even if there is a preset.
  Raises:
    ValueError: neither is set, or they are not the same.
  """
  preset, source = config.model.preset, config.model.weights
  if source.startswith("preset:"):
    return get_architecture(source.removeprefix("preset:"))
  if preset and not weights:
    return get_architecture(preset)
  if not source:
    raise ValueError("Set config.model.preset, or config.model.weights to a model that is there.")
  arch = read_architecture(find_file(source))
  if preset and arch != (named := get_architecture(preset)):
    names = [field.name for field in dataclasses.fields(arch)]
    differ = [name for name in names if getattr(arch, name) != getattr(named, name)]
    raise ValueError(
      f"{source} is no {preset!r}: it differs in {', '.join(differ)}; change config.model.preset "
      "or empty it."
    )
  return arch


def load_tokenizer_and_model(
  config, *, platform: str = "cpu", dimensions: int = 0
) -> tuple[Tokenizer, Decoder]:
  """The tokenizer of config.model and the base model, shapes alone.

  Args:
    dimensions: of its learned bridge; 0 for none.

  Raises:
    ValueError: the tokenizer does not fit the model, or the row is too long for it.
  """
  weights = config.model.weights
  if not weights:
    raise ValueError("config.model.weights is empty; set it to a model or 'preset:NAME'.")
  arch = architecture(config, weights=True)
  beside = "bytes" if weights.startswith("preset:") else find_file(weights)
  model = abstract_model(config, arch, platform=platform, dimensions=dimensions)
  tokenizer = load_tokenizer(config.model.tokenizer or beside)
  # Models pad their vocabulary a little; one much larger belongs to another tokenizer.
  least = 0 if weights.startswith("preset:") else 0.9 * model.arch.vocab_size
  if not least <= tokenizer.vocab_size <= model.arch.vocab_size:
    raise ValueError(
      f"The tokenizer has {tokenizer.vocab_size} ids and the model {weights} embeds "
      f"{model.arch.vocab_size}; set config.model.tokenizer to the model's own."
    )
  field = "prompt" if has_head(config) or has_latent(config) else "context"
  longest = config.regions[field] + config.regions.response
  if longest > model.arch.max_positions:
    raise ValueError(
      f"config.regions.{field} and response make {longest} positions; {weights} was made for "
      f"{model.arch.max_positions}: lower them."
    )
  return tokenizer, model


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
    params=experiment.load_base(),
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


def restored_params(experiment: Experiment) -> nnx.State:
  """All parameters of the newest good checkpoint of an experiment's workdir.

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
  trained = checkpoints.newest_params(trained).state
  checkpoints.close()
  return nnx.merge_state(trained, frozen)


def _checkpoints(workdir: Path) -> Checkpoints:
  checkpoints = Checkpoints(workdir, keep=1)
  if not checkpoints.steps():
    raise FileNotFoundError(f"{workdir} has no checkpoint; train there first.")
  return checkpoints
