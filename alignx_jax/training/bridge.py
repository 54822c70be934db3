"""How a learned bridge starts, and what is trained beside a decoder by config and data."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from alignx_jax.data.loader import Loader
from alignx_jax.data.tokenizers import Tokenizer
from alignx_jax.files import as_path
from alignx_jax.models.bridge import TABLES
from alignx_jax.models.decoder import Decoder
from alignx_jax.objectives.pba import BridgeObjective, class_shares, class_weights
from alignx_jax.objectives.vpl import LatentObjective
from alignx_jax.personas.preferences import PreferenceSpace
from alignx_jax.training import mesh as meshes
from alignx_jax.training.steps import count_dimensions, has_latent

SPACE = "preference_space.json"  # in the workdir of a run with a learned bridge
# Records from which the frequencies of directions are counted.
_SAMPLE = 4096


def objective_beside(
  config, model: Decoder, loader: Loader, steps: int
) -> BridgeObjective | LatentObjective | None:
  """How what a model has beside its decoder is trained, in a run of so many steps on this data.

  That is a learned bridge or a latent user variable; None for neither.
  """
  if count_dimensions(model):
    labels_XP = label_sample(loader.examples, loader.formatting)
    return bridge_objective(config, loader.formatting.space_of_bridge, labels_XP, steps)
  return LatentObjective.of(config, steps) if has_latent(model) else None


def bridge_objective(
  config, space: PreferenceSpace, labels_XP: np.ndarray, steps: int
) -> BridgeObjective:
  """What config.bridge says of training a learned bridge.

  Args:
    space: of the bridge.
    labels_XP: label_sample of the training data, whose frequencies weigh the loss.
  """
  bridge = config.bridge
  return BridgeObjective(
    label_weight=bridge.label_weight,
    act_weight=bridge.act_weight,
    class_weights=class_weights(labels_XP, bridge.balance),
    forcing=tuple(bridge.forcing),
    forcing_steps=bridge.forcing_share * steps,
    dpo_gradient=bridge.dpo_gradient,
    seed=config.seed,
    rows=_new_rows(bridge, space),
  )


def _new_rows(bridge, space: PreferenceSpace) -> tuple[int, ...] | None:
  """Indices of the dimensions to train alone; None for all."""
  if not bridge.new_only:
    return None
  rows_P = space.rows_from(PreferenceSpace.from_json(as_path(bridge.start) / SPACE))
  return tuple(np.flatnonzero(rows_P < 0).tolist())


def label_sample(examples: Sequence, formatting) -> np.ndarray:
  """The labels of some examples, evenly spread, in the bridge's space: [X, P], −1 if unknown."""
  places = np.unique(np.linspace(0, len(examples) - 1, min(_SAMPLE, len(examples))).astype(int))
  labels = [formatting.labels(examples[int(i)].directions) for i in places]
  known = [label for label in labels if label is not None]
  return np.stack(known) if known else np.zeros((0, len(formatting.space_of_bridge)))


def start_bridge(
  params: nnx.State, space: PreferenceSpace, tokenizer: Tokenizer, labels_XP: np.ndarray
) -> nnx.State:
  """Parameters with the tables of a bridge started from the phrases of a space's poles.

  A pole's token and what the head looks for start as the mean embedding of its phrase's
  tokens, a neutral token as nothing; and the head starts with how frequent the three
  directions are among the labels.

  Args:
    params: of a Decoder with a bridge, whose other parameters are kept.
    labels_XP: below 0 where unknown.
  """
  phrases = [
    tokenizer.encode(pole)
    for dimension in space.dimensions
    for pole in (dimension.negative, dimension.positive)
  ]
  longest = max(map(len, phrases))
  ids = np.array([phrase + [0] * (longest - len(phrase)) for phrase in phrases], np.int32)
  sizes = np.array([[len(phrase)] for phrase in phrases])
  weights = (np.arange(longest) < sizes) / sizes
  shares_K = class_shares(labels_XP) if len(labels_XP) else np.array([0.05, 0.9, 0.05])
  mesh = params["embedding_VD"][...].sharding.mesh

  def tables(embedding_VD):
    vectors = jnp.take(embedding_VD, ids, axis=0).astype(jnp.float32)
    pole_PQD = jnp.einsum("xtd,xt->xd", vectors, weights.astype(np.float32))
    pole_PQD = pole_PQD.reshape(len(space), 2, -1)
    neutral_PD = jnp.zeros_like(pole_PQD[:, 0])
    token_PKD = jnp.stack([pole_PQD[:, 0], neutral_PD, pole_PQD[:, 1]], axis=1)
    bias_PK = jnp.broadcast_to(jnp.log(shares_K.astype(np.float32)), (len(space), 3))
    return {"token_PKD": token_PKD, "pole_PQD": pole_PQD, "bias_PK": bias_PK}

  tables = jax.jit(tables, out_shardings=meshes.replicated(mesh))(params["embedding_VD"][...])
  bridge = params["bridge"]
  for name, value in tables.items():
    bridge[name] = bridge[name].replace(value)
  return params


def continue_bridge(
  params: nnx.State, space: PreferenceSpace, old: nnx.State, old_space: PreferenceSpace
) -> nnx.State:
  """Parameters whose bridge goes on from a trained one, whatever became of its space.

  A dimension that the old space has keeps what was learnt of it, whatever its place and even if
  it was renamed (Dimension.formerly). A new one keeps how it was started, and reads and is
  read by what the others taught.

  Args:
    params: of a model with the new space, as start_bridge gives.
    old: of the trained bridge alone.
  """
  rows_P = space.rows_from(old_space)
  bridge = params["bridge"]
  for name in bridge:
    value = old[name][...]
    if name in TABLES:
      known_P = (rows_P >= 0).reshape(-1, *[1] * (value.ndim - 1))
      value = jnp.where(known_P, value[np.maximum(rows_P, 0)], bridge[name][...])
    bridge[name] = bridge[name].replace(jax.device_put(value, bridge[name][...].sharding))
  return params
