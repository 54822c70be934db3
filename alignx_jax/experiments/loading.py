"""The parts of an experiment, each as a config names it: mesh, formatting, model, weights."""

import dataclasses

import jax
from flax import nnx
from jax.sharding import Mesh

from alignx_jax.data.formatting import Formatting
from alignx_jax.data.prepared import is_prepared, prepared_space
from alignx_jax.data.proposals import proposed_regions
from alignx_jax.data.rows import Regions
from alignx_jax.data.tokenizers import Tokenizer, find_file, load_tokenizer
from alignx_jax.experiments.config_checks import has_head, has_latent
from alignx_jax.models.bridge import BridgeParam, add_bridge
from alignx_jax.models.decoder import Decoder
from alignx_jax.models.latent import add_latent
from alignx_jax.models.lora import LoraParam, add_lora
from alignx_jax.models.presets import Architecture, get_architecture
from alignx_jax.models.pretrained import load_decoder, read_architecture
from alignx_jax.personas.persona import HistoryPolicy
from alignx_jax.personas.preferences import PreferenceSpace, alignx_space
from alignx_jax.training import mesh as meshes
from alignx_jax.training.steps import count_dimensions

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
