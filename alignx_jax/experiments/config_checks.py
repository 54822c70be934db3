"""What a config says that would fail late or oddly: refused at once, by its field."""

from pathlib import Path

from jax.sharding import Mesh

from alignx_jax.evaluation.accuracy import PROTOCOLS
from alignx_jax.files import as_path
from alignx_jax.objectives.losses import LOSSES
from alignx_jax.personas.preferences import PreferenceSpace
from alignx_jax.training import mesh as meshes
from alignx_jax.training.bridge import SPACE
from alignx_jax.training.run_config import run_config

OBJECTIVES = ("ica", "pba", "dpo", "vpl")
DTYPES = ("float32", "bfloat16", "float16")
# Fields of config.objective that one loss alone has.
OF_ONE_LOSS = {"label_smoothing": "sigmoid", "target_margin": "simpo"}


def has_head(config) -> bool:
  """Whether a config's policy reads P̃ through a learned bridge."""
  return config.objective.name == "pba" and config.bridge.kind == "head"


def has_latent(config) -> bool:
  """Whether a config's policy reads a latent user variable."""
  return config.objective.name == "vpl"


def check_names(config) -> None:
  """Raises ValueError on an unknown objective, loss or bridge, or a number that is of another."""
  for field, value, known in (
    ("objective.name", config.objective.name, OBJECTIVES),
    ("objective.loss", config.objective.loss, tuple(LOSSES)),
    ("bridge.kind", config.bridge.kind, ("text", "head")),
  ):
    if value not in known:
      raise ValueError(f"config.{field} is {value!r}; set it to {' or '.join(known)}.")
  objective = config.objective
  if objective.beta <= 0:
    raise ValueError(f"config.objective.beta is {objective.beta}; set it above 0.")
  if not 0 <= objective.label_smoothing < 0.5:
    raise ValueError(
      f"config.objective.label_smoothing is {objective.label_smoothing}; set it to 0 or more, and "
      "below 0.5, where labels say nothing."
    )
  for field in ("target_margin", "likelihood_weight"):
    if objective[field] < 0:
      raise ValueError(f"config.objective.{field} is {objective[field]}; set it to 0 or more.")
  if objective.group_step is not None and not (objective.groups and objective.group_step >= 0):
    raise ValueError(
      f"config.objective.group_step is {objective.group_step}; set it to 0 or more, and "
      "config.objective.groups to what the groups are by."
    )
  for field, loss in OF_ONE_LOSS.items():
    if objective[field] and objective.loss != loss:
      raise ValueError(
        f"config.objective.{field} is {objective[field]}, and {objective.loss!r} has none: set it "
        f"to 0, or config.objective.loss to {loss!r}."
      )


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
  text = not (has_head(config) or has_latent(config))
  for field in ("context",) * text + ("response", "examples"):
    if config.regions[field] < 1:
      raise ValueError(
        f"config.regions.{field} is {config.regions[field]}; a row needs 1 or more of it."
      )
  for field in ("param_dtype", "compute_dtype"):
    if config.model[field] not in DTYPES:
      raise ValueError(
        f"config.model.{field} is {config.model[field]!r}; set it to {' or '.join(DTYPES)}."
      )
  for field in ("train_records", "validation_records", "test_records"):
    if config.data[field] is not None and config.data[field] < 0:
      raise ValueError(
        f"config.data.{field} is {config.data[field]}; set it to 0 or more, or to None for all."
      )
  if not 0 < config.data.test_share < 1:
    raise ValueError(f"config.data.test_share is {config.data.test_share}; set it between 0 and 1.")
  check_bridge(config)
  if has_latent(config):
    check_latent(config)
  if has_head(config) or has_latent(config):
    check_personas(config, mesh)


def check_bridge(config) -> None:
  """Raises ValueError, naming the field, on what a learned bridge cannot be or be made of."""
  bridge = config.bridge
  if not has_head(config):
    for field in ("alone", "new_only", "start"):
      if bridge[field]:
        raise ValueError(
          f"config.bridge.{field} is of a learned bridge; set config.objective.name to 'pba' and "
          "config.bridge.kind to 'head'."
        )
    return
  if bridge.new_only and not (bridge.alone and bridge.start):
    raise ValueError(
      "config.bridge.new_only trains the dimensions that config.bridge.start has not, beside a "
      "frozen model: set config.bridge.start to a run and config.bridge.alone to True."
    )
  if len(bridge.forcing) != 2 or not all(0 <= share <= 1 for share in bridge.forcing):
    raise ValueError(
      f"config.bridge.forcing is {tuple(bridge.forcing)}; set it to two shares from 0 to 1, of the "
      "first steps and of the last."
    )
  for field in ("label_weight", "act_weight", "forcing_share", "threshold"):
    if bridge[field] < 0:
      raise ValueError(f"config.bridge.{field} is {bridge[field]}; set it to 0 or more.")


def check_latent(config) -> None:
  """Raises ValueError, naming the field, on what a latent user variable cannot be or read."""
  for field in ("size", "tokens", "width"):
    if config.latent[field] < 1:
      raise ValueError(f"config.latent.{field} is {config.latent[field]}; set it to 1 or more.")
  for field in ("kl_weight", "annealing_share"):
    if config.latent[field] < 0:
      raise ValueError(f"config.latent.{field} is {config.latent[field]}; set it to 0 or more.")
  if "pair" not in config.history.kinds:
    raise ValueError(
      f"config.history.kinds is {tuple(config.history.kinds)}; the objective 'vpl' reads compared "
      "pairs alone: add 'pair'."
    )


def check_personas(config, mesh: Mesh) -> None:
  """Raises ValueError, naming the field, on rows that cannot hold personas beside prompts."""
  sizes = config.regions
  if sizes.layout:
    raise ValueError(
      f"config.regions.layout is {sizes.layout!r}; there are no proposals for rows with a learned "
      "bridge or a latent variable: empty it, and set config.regions.prompt, response, persona and "
      "parts."
    )
  for field in ("prompt", "persona", "parts"):
    if sizes[field] < 1:
      raise ValueError(
        f"config.regions.{field} is {sizes[field]}; a learned bridge or a latent variable needs 1 "
        "or more."
      )
  context = mesh.shape["context"]
  if sizes.persona % context:
    raise ValueError(
      f"config.regions.persona is {sizes.persona}; set it to a multiple of the {context} devices "
      "that positions are split over (config.mesh.context)."
    )


def check_start(config, space: PreferenceSpace) -> None:
  """Checks what config.bridge.start names, if anything.

  Args:
    space: of the bridge.
  Raises:
    FileNotFoundError: there is no such run.
    ValueError: its bridge is of another size, or all dimensions that new_only would train are
      old; names the field.
  """
  bridge = config.bridge
  if not (has_head(config) and bridge.start):
    return
  size = head_config(config, as_path(bridge.start)).bridge.size
  if size != bridge.size:
    raise ValueError(
      f"config.bridge.size is {bridge.size}; {bridge.start} has {size}: set it likewise."
    )
  old = PreferenceSpace.from_json(as_path(bridge.start) / SPACE)
  if bridge.new_only and (space.rows_from(old) >= 0).all():
    raise ValueError(
      f"The preference space has no dimension that {bridge.start} has not; set "
      "config.bridge.space to one with new dimensions, or config.bridge.new_only to False."
    )


def head_config(base, workdir: Path):
  """The config of a run with a learned bridge, see run_config.

  Raises:
    FileNotFoundError: there is no such run.
    ValueError: the run has no learned bridge.
  """
  config = run_config(base=base, workdir=workdir)
  if not has_head(config):
    raise ValueError(
      f"{workdir} is no run with a learned bridge: train there with config.objective.name 'pba' "
      "and config.bridge.kind 'head'."
    )
  return config
