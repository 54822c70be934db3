"""What a config stands for: model, data and formatting; trained and evaluated."""

import dataclasses
from pathlib import Path

import jax
from flax import nnx
from jax.sharding import Mesh

from alignx_jax.data.formatting import Formatting
from alignx_jax.data.loader import PACKING, Loader
from alignx_jax.data.prepared import PreparedExamples, is_prepared, prepared_space
from alignx_jax.data.proposals import proposed_regions
from alignx_jax.data.records import Example
from alignx_jax.data.rows import Regions
from alignx_jax.data.splits import load_splits
from alignx_jax.data.stream import mixing_rates
from alignx_jax.data.tokenizers import Tokenizer, find_file, load_tokenizer
from alignx_jax.evaluation.accuracy import (
  PROTOCOLS,
  Scorer,
  evaluate_base,
  evaluate_policy,
  length_control,
)
from alignx_jax.evaluation.results import format_table, write_results
from alignx_jax.models.decoder import Decoder
from alignx_jax.models.lora import add_lora, split_trainable
from alignx_jax.models.presets import Architecture, get_architecture
from alignx_jax.models.pretrained import load_decoder, read_architecture
from alignx_jax.personas.persona import HistoryPolicy
from alignx_jax.personas.preferences import PreferenceSpace, alignx_space
from alignx_jax.training import hosts
from alignx_jax.training import mesh as meshes
from alignx_jax.training.checkpoints import Checkpoints
from alignx_jax.training.loop import TrainResult, train
from alignx_jax.training.reference import LogProbs, cache_key, fingerprint
from alignx_jax.training.run_config import check_run_config
from alignx_jax.training.steps import param_shapes

# The condition that each objective trains on.
OBJECTIVES = {"ica": "persona", "pba": "inferred"}


@dataclasses.dataclass(frozen=True)
class Experiment:
  """Everything that a config names, loaded.

  Attributes:
    model: the base, shapes alone: start of the policy and frozen reference.
    mesh: on which models lie.
    formatting: as the policy is trained.
  """

  config: object
  model: Decoder
  mesh: Mesh
  formatting: Formatting
  train: list[Example]
  test: list[Example]

  def with_objective(self, name: str) -> "Experiment":
    """The same model and data under another objective."""
    config = self.config.copy_and_resolve_references()
    config.objective.name = name
    formatting = dataclasses.replace(self.formatting, condition=OBJECTIVES[name])
    formatting = _with_regions(config, formatting)
    return dataclasses.replace(self, config=config, formatting=formatting)

  def load_base(self) -> nnx.State:
    """Parameters of the base on the mesh, with an adapter that changes nothing if there is one.

    Read anew at each call: training gives them away.
    """
    return load_params(self.config, self.model, self.mesh)


def load_experiment(config) -> Experiment:
  """Loads what a config names, all but the weights.

  Raises:
    FileNotFoundError, ValueError: what does not exist or fit, and the field to set.
  """
  if config.objective.name not in OBJECTIVES:
    raise ValueError(
      f"No objective {config.objective.name!r}; set config.objective.name to "
      f"{' or '.join(OBJECTIVES)}."
    )
  mesh = _make_mesh(config)
  check_sizes(config, mesh)
  tokenizer, model = load_tokenizer_and_model(config, platform=mesh.devices.flat[0].platform)
  meshes.param_shardings(nnx.state(model), mesh)  # raises where sizes do not divide
  space = _space(config)
  splits = load_splits(config.data, space, seed=config.seed)
  formatting = make_formatting(config, tokenizer, space)
  return Experiment(config, model, mesh, formatting, splits["train"], splits["test"])


def make_formatting(config, tokenizer: Tokenizer, space: PreferenceSpace) -> Formatting:
  """How a config's examples become token ids when its policy is trained."""
  formatting = Formatting(
    tokenizer=tokenizer,
    space=space,
    regions=Regions(config.regions.context, config.regions.response, config.regions.examples),
    chat=config.prompt.chat,
    prompt=config.prompt.format,
    condition=OBJECTIVES[config.objective.name],
    history=HistoryPolicy(**config.history),
  )
  return _with_regions(config, formatting)


def _space(config) -> PreferenceSpace:
  """The dimensions that the directions of a config's records are of."""
  if is_prepared(config.data.path):
    return prepared_space(config.data.path)
  return alignx_space()


def _with_regions(config, formatting: Formatting) -> Formatting:
  """The formatting with the proposed regions that config.regions.layout names, if any."""
  if not config.regions.layout:
    return formatting
  regions = proposed_regions(config.data.path, formatting, config.regions.layout)
  return dataclasses.replace(formatting, regions=regions)


def _make_mesh(config) -> Mesh:
  count = config.train.devices or jax.device_count()
  if count > jax.device_count():
    raise ValueError(f"config.train.devices is {count}; there are {jax.device_count()}.")
  if count < jax.device_count() and jax.process_count() > 1:
    raise ValueError(f"config.train.devices is {count}; several processes use all: set it to 0.")
  return meshes.make_mesh(config.mesh, jax.devices()[:count])


def check_sizes(config, mesh: Mesh) -> None:
  """Raises ValueError, naming the field, on what would fail late or oddly."""
  shards = meshes.row_shards(mesh)
  for field, rows in (("train.rows", config.train.rows), ("eval.rows", config.eval.rows)):
    if rows < 1 or rows % shards:
      raise ValueError(
        f"config.{field} is {rows}; set it to a multiple of the {shards} devices that rows are "
        "split over, or change config.mesh or config.train.devices."
      )
  if config.train.rows % (config.train.accumulation * shards):
    raise ValueError(
      f"config.train.accumulation is {config.train.accumulation}; {config.train.rows} rows do "
      f"not split into that many parts on {shards} devices: change config.train.rows."
    )
  if config.reference.kind not in ("cached", "online"):
    raise ValueError(
      f"config.reference.kind is {config.reference.kind!r}; set it to 'cached' or 'online'."
    )
  if config.reference.kind == "online" and not config.lora.rank:
    raise ValueError(
      "config.reference.kind 'online' takes the policy without its adapter for the reference: "
      "set config.lora.rank, or config.reference.kind to 'cached'."
    )
  if unknown := set(config.eval.protocols) - set(PROTOCOLS):
    raise ValueError(
      f"config.eval.protocols has {sorted(unknown)[0]!r}; there are {', '.join(PROTOCOLS)}."
    )


def abstract_model(config, arch, *, platform: str) -> Decoder:
  """A Decoder of shapes alone, as config.model and config.lora say.

  Args:
    platform: of the devices that it will run on.
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
    if config.lora.rank:
      add_lora(model, rank=config.lora.rank, alpha=config.lora.alpha, rngs=nnx.Rngs(0))
    return model

  return nnx.eval_shape(make)


def load_params(config, model: Decoder, mesh: Mesh) -> nnx.State:
  """Parameters of config.model.weights in the shapes of `model`, each shard on its device."""
  options = {"param_dtype": config.model.param_dtype}

  def initial(what):
    """Some of the parameters as they are before training, made where they lie."""

    def make():
      model_ = Decoder(model.arch, rngs=nnx.Rngs(config.seed), **options)
      if config.lora.rank:
        rngs = nnx.Rngs(config.seed + 1)
        add_lora(model_, rank=config.lora.rank, alpha=config.lora.alpha, rngs=rngs)
      return what(nnx.state(model_))

    return jax.jit(make, out_shardings=what(meshes.param_shardings(nnx.state(model), mesh)))()

  weights = config.model.weights
  if weights.startswith("preset:"):
    return initial(lambda state: state)
  shardings = lambda params: meshes.param_shardings(params, mesh)
  base = nnx.state(load_decoder(find_file(weights), shardings=shardings, **options))
  if not config.lora.rank:
    return base
  return nnx.merge_state(base, initial(lambda state: split_trainable(state)[0]))


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


def load_tokenizer_and_model(config, *, platform: str = "cpu") -> tuple[Tokenizer, Decoder]:
  """The tokenizer of config.model and the base model, shapes alone.

  Raises:
    ValueError: the tokenizer does not fit the model, or the row is too long for it.
  """
  weights = config.model.weights
  if not weights:
    raise ValueError("config.model.weights is empty; set it to a model or 'preset:NAME'.")
  arch = architecture(config, weights=True)
  beside = "bytes" if weights.startswith("preset:") else find_file(weights)
  model = abstract_model(config, arch, platform=platform)
  tokenizer = load_tokenizer(config.model.tokenizer or beside)
  # Models pad their vocabulary a little; one much larger belongs to another tokenizer.
  least = 0 if weights.startswith("preset:") else 0.9 * model.arch.vocab_size
  if not least <= tokenizer.vocab_size <= model.arch.vocab_size:
    raise ValueError(
      f"The tokenizer has {tokenizer.vocab_size} ids and the model {weights} embeds "
      f"{model.arch.vocab_size}; set config.model.tokenizer to the model's own."
    )
  longest = config.regions.context + config.regions.response
  if longest > model.arch.max_positions:
    raise ValueError(
      f"config.regions.context and response make {longest} positions; {weights} was made for "
      f"{model.arch.max_positions}: lower them."
    )
  return tokenizer, model


def run_training(experiment: Experiment, workdir: Path) -> TrainResult:
  """Trains as the config says; again resumes."""
  return train(
    experiment.config,
    workdir,
    model=experiment.model,
    params=experiment.load_base(),
    mesh=experiment.mesh,
    loader=training_loader(experiment),
  )


def training_loader(experiment: Experiment) -> Loader:
  """The stream of a config's training examples."""
  config, mixture = experiment.config, None
  if config.data.temperature != 1:
    if not isinstance(experiment.train, PreparedExamples):
      raise ValueError(
        "config.data.temperature weighs the sources of a prepared set; set it to 1 or "
        "config.data.path to what alignx_jax.prepare_data wrote."
      )
    groups = list(experiment.train.by_source().values())
    mixture = groups, mixing_rates([len(group) for group in groups], config.data.temperature)
  return Loader(
    experiment.train,
    experiment.formatting,
    rows=config.train.rows,
    epochs=config.train.epochs,
    seed=config.seed,
    workers=config.data.workers,
    mixture=mixture,
  )


def base_scorer(experiment: Experiment) -> Scorer:
  """Scores of the untrained base on the test pairs."""
  return _scorer(experiment, "base", experiment.load_base())


def base_results(experiment: Experiment, base: Scorer, objectives) -> list[dict]:
  """Rows of results.json that need no training: the length control and the base."""
  return [length_control(experiment.test), *evaluate_base(base, objectives)]


def policy_results(experiment: Experiment, params: nnx.State, base: Scorer) -> list[dict]:
  """Rows of results.json of trained parameters, with their controls."""
  name = experiment.config.objective.name
  policy = _scorer(experiment, name, params)
  return evaluate_policy(name, policy, base, protocols=experiment.config.eval.protocols)


def evaluate_alone(experiment: Experiment, params: nnx.State) -> list[dict]:
  """All rows of results.json for one run: controls, base and policy."""
  base = base_scorer(experiment)
  rows = base_results(experiment, base, [experiment.config.objective.name])
  return rows + policy_results(experiment, params, base)


def report_results(workdir: Path, results: list[dict]) -> None:
  """Writes results.json and prints the table; of several processes the first does."""
  if hosts.is_first():
    write_results(workdir / "results.json", results)
    print(format_table(results))


def trained_params(experiment: Experiment, workdir: Path) -> nnx.State:
  """All parameters of the newest checkpoint of a run of this config.

  Raises:
    FileNotFoundError: there is none.
    ValueError: another config made the run.
  """
  checkpoints = Checkpoints(workdir, keep=1)
  step = checkpoints.latest_step()
  if step is None:
    raise FileNotFoundError(f"{workdir} has no checkpoint; train there first.")
  base = experiment.load_base()
  key = cache_key(training_loader(experiment), experiment.model, fingerprint(base))
  check_run_config(experiment.config, workdir, f"{key}-{PACKING}")
  trained, frozen = split_trainable(base)
  shapes = split_trainable(param_shapes(experiment.model, experiment.mesh))[0]
  del base, trained  # room for what is restored
  trained = checkpoints.restore_params(step, shapes)
  checkpoints.close()
  return nnx.merge_state(trained, frozen)


def _scorer(experiment: Experiment, name: str, params: nnx.State) -> Scorer:
  config = experiment.config
  log_probs = LogProbs(
    experiment.model, params, experiment.mesh, config.eval.rows, config.train.head_chunk
  )
  # Whatever the condition it trains on, a policy is compared with what reads the whole persona.
  formatting = dataclasses.replace(experiment.formatting, condition="persona")
  formatting = _with_regions(config, formatting)
  return Scorer(name, log_probs, experiment.test, formatting, config.eval.rows)
