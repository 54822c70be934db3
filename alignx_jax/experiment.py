"""What a config stands for: model, data and formatting; trained and evaluated."""

import dataclasses
from pathlib import Path

import jax
from flax import nnx

from alignx_jax.data.formatting import Formatting
from alignx_jax.data.loader import Loader
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
from alignx_jax.models.decoder import Decoder
from alignx_jax.models.presets import get_architecture
from alignx_jax.models.pretrained import load_decoder
from alignx_jax.personas.persona import HistoryPolicy
from alignx_jax.personas.preferences import PreferenceSpace, alignx_space
from alignx_jax.training import mesh as meshes
from alignx_jax.training.checkpoints import Checkpoints
from alignx_jax.training.loop import TrainResult, scorer, train
from alignx_jax.training.reference import cache_key
from alignx_jax.training.run_config import check_run_config

# The condition that each objective trains on.
OBJECTIVES = {"ica": "persona", "pba": "inferred"}


@dataclasses.dataclass(frozen=True)
class Experiment:
  """Everything that a config names, loaded.

  Attributes:
    model: the base: start of the policy and frozen reference.
    formatting: as the policy is trained.
  """

  config: object
  model: Decoder
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


def load_experiment(config) -> Experiment:
  """Loads what a config names.

  Raises:
    FileNotFoundError, ValueError: what does not exist or fit, and the field to set.
  """
  if config.objective.name not in OBJECTIVES:
    raise ValueError(
      f"No objective {config.objective.name!r}; set config.objective.name to "
      f"{' or '.join(OBJECTIVES)}."
    )
  _check_sizes(config)
  tokenizer, model = load_tokenizer_and_model(config)
  space = _space(config)
  splits = load_splits(config.data, space, seed=config.seed)
  formatting = Formatting(
    tokenizer=tokenizer,
    space=space,
    regions=Regions(config.regions.context, config.regions.response, config.regions.examples),
    chat=config.prompt.chat,
    prompt=config.prompt.format,
    condition=OBJECTIVES[config.objective.name],
    history=HistoryPolicy(**config.history),
  )
  return Experiment(
    config, model, _with_regions(config, formatting), splits["train"], splits["test"]
  )


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


def _check_sizes(config) -> None:
  """Raises ValueError, naming the field, on what would fail late or oddly."""
  devices = config.train.devices or jax.device_count()
  if devices > jax.device_count():
    raise ValueError(f"config.train.devices is {devices}; this machine has {jax.device_count()}.")
  for field, rows in (("train.rows", config.train.rows), ("eval.rows", config.eval.rows)):
    if rows < 1 or rows % devices:
      raise ValueError(
        f"config.{field} is {rows}; set it to a multiple of the {devices} devices, or set "
        "config.train.devices."
      )
  if config.train.rows % (config.train.accumulation * devices):
    raise ValueError(
      f"config.train.accumulation is {config.train.accumulation}; {config.train.rows} rows do "
      f"not split into that many parts on {devices} devices: change config.train.rows."
    )
  if unknown := set(config.eval.protocols) - set(PROTOCOLS):
    raise ValueError(
      f"config.eval.protocols has {sorted(unknown)[0]!r}; there are {', '.join(PROTOCOLS)}."
    )


def load_tokenizer_and_model(config) -> tuple[Tokenizer, Decoder]:
  """The tokenizer and the base model of config.model.

  Raises:
    ValueError: the tokenizer does not fit the model, or the row is too long for it.
  """
  options = {name: config.model[name] for name in ("param_dtype", "compute_dtype", "remat")}
  weights = config.model.weights
  if not weights:
    raise ValueError("config.model.weights is empty; set it to a model or 'preset:NAME'.")
  if weights.startswith("preset:"):
    arch = get_architecture(weights.removeprefix("preset:"))
    model = Decoder(arch, rngs=nnx.Rngs(config.seed), **options)
    beside = "bytes"
  else:
    beside = find_file(weights)
    model = load_decoder(beside, **options)
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
  loader = training_loader(experiment)
  return train(experiment.config, workdir, model=experiment.model, loader=loader)


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
  return _scorer(experiment, "base", nnx.state(experiment.model))


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


def trained_params(experiment: Experiment, workdir: Path) -> nnx.State:
  """Parameters of the newest checkpoint of a run of this config.

  Raises:
    FileNotFoundError: there is none.
    ValueError: another config made the run.
  """
  checkpoints = Checkpoints(workdir, keep=1)
  step = checkpoints.latest_step()
  if step is None:
    raise FileNotFoundError(f"{workdir} has no checkpoint; train there first.")
  key = cache_key(training_loader(experiment), experiment.model)
  check_run_config(experiment.config, workdir, key)
  params = checkpoints.restore_params(step, nnx.state(experiment.model))
  checkpoints.close()
  return params


def _scorer(experiment: Experiment, name: str, params: nnx.State) -> Scorer:
  config = experiment.config
  mesh = meshes.make_mesh(config.train.devices or None)
  params = jax.device_put(params, meshes.param_shardings(params, mesh))
  log_probs = scorer(
    experiment.model, params, mesh, rows=config.eval.rows, chunk=config.train.head_chunk
  )
  # Whatever the condition it trains on, a policy is compared with what reads the whole persona.
  formatting = dataclasses.replace(experiment.formatting, condition="persona")
  formatting = _with_regions(config, formatting)
  return Scorer(name, log_probs, experiment.test, formatting, config.eval.rows)
