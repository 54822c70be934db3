"""The learned preference bridge: personas to P̃, and P̃ to tokens that the policy reads.

The head reads a persona as a set of parts, each encoded by itself by the decoder, and looks
for evidence of each pole of each dimension in all of them. Evidence adds up, so the order of
the parts is of no matter, and a new act is added to what is known at the cost of reading it
alone. P̃ then enters the policy as P bridge tokens, Σ_k P̃(k) · E[dimension, k]: the policy
sees the prompt, these and the response, never the persona.

Every parameter of a dimension starts from the phrases of its poles, and what is shared knows
nothing of dimensions, so a space is data, and a new dimension starts with what the others
taught.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from alignx_jax.data.rows import Personas, Rows
from alignx_jax.models.decoder import embed
from alignx_jax.models.parallel import ROWS, constrain
from alignx_jax.personas.prompts import PART_KINDS

# Parameters that have a row for each dimension; the others know nothing of dimensions.
TABLES = ("token_PKD", "pole_PQD", "bias_PK")
LEAST = 0.15  # probability of not being neutral from which a dimension's token is seen
VALUES = 16  # V, what a token says of the poles that it matches


def _exact(method):
  """Products in float32: TPUs would take bfloat16, whose error the exponentials enlarge."""

  @functools.wraps(method)
  def call(*arguments):
    with jax.default_matmul_precision("highest"):
      return method(*arguments)

  return call


class BridgeParam(nnx.Param):
  """A parameter of the bridge."""


class Evidence(NamedTuple):
  """What was found for each pole (Q = 2: negative, positive), to be added up; float32.

  Scores are bounded (Bridge.sharpness), so their exponentials are summed as they are.

  Attributes:
    mass_PQ: Σ exp(score) over the tokens read.
    value_PQV: Σ exp(score) · value.
  """

  mass_PQ: jax.Array
  value_PQV: jax.Array

  def __add__(self, other: "Evidence") -> "Evidence":
    """What two disjoint sets of tokens say together."""
    return Evidence(self.mass_PQ + other.mass_PQ, self.value_PQV + other.value_PQV)


class Bridge(nnx.Module):
  """The parameters of a bridge over P dimensions, float32; start_bridge fills the tables.

  Attributes:
    token_PKD: E, the bridge tokens of each dimension's negative, neutral and positive.
    pole_PQD: what the head looks for, of each dimension's negative and positive pole.
    bias_PK: log-probabilities where there is no evidence.
  """

  def __init__(self, dimensions: int, width: int, *, size: int, rngs: nnx.Rngs):
    P, D, A, V = dimensions, width, size, VALUES

    def normal(*shape, scale):
      return BridgeParam(scale * jax.random.normal(rngs.params(), shape, jnp.float32))

    self.token_PKD = BridgeParam(jnp.zeros((P, 3, D)))
    self.pole_PQD = BridgeParam(jnp.zeros((P, 2, D)))
    self.bias_PK = BridgeParam(jnp.zeros((P, 3)))
    # A pole looks for itself to begin with: queries and keys are projected alike.
    self.query_DA = normal(D, A, scale=D**-0.5)
    self.key_DA = BridgeParam(self.query_DA[...])
    self.key_embedded_DA = BridgeParam(self.query_DA[...])
    self.value_DV = normal(D, V, scale=D**-0.5)
    self.value_embedded_DV = normal(D, V, scale=D**-0.5)
    self.kind_score = BridgeParam(jnp.zeros((len(PART_KINDS),)))
    self.kind_value_V = BridgeParam(jnp.zeros((len(PART_KINDS), V)))
    self.sharpness = BridgeParam(jnp.full((), jnp.log(2.0), jnp.float32))
    self.least = BridgeParam(jnp.full((), 4.0, jnp.float32))
    self.out_QVK = normal(2, V, 3, scale=0.1 * V**-0.5)

  @_exact
  def evidence(self, hidden_BUD, embedded_BUD, parts_BU, kinds_BX) -> Evidence:
    """What the tokens of each part say: [B, X, …].

    Args:
      hidden_BUD: the decoder's final hidden states of a persona region.
      embedded_BUD: its tokens' embeddings: hidden states tell what may follow a token.
      parts_BU: the part of each token, 1 … X; 0 is padding.
      kinds_BX: the kind of each part.
    """
    hidden, embedded = hidden_BUD.astype(jnp.float32), _unit(embedded_BUD.astype(jnp.float32))
    query_PQA = _unit(_unit(self.pole_PQD[...]) @ self.query_DA[...])
    key_BUA = _unit(hidden @ self.key_DA[...] + embedded @ self.key_embedded_DA[...])
    value_BUV = hidden @ self.value_DV[...] + embedded @ self.value_embedded_DV[...]
    size = key_BUA.shape[-1]
    cosine_BPQU = jnp.einsum("pqa,bua->bpqu", query_PQA, key_BUA) / size
    X = kinds_BX.shape[1]
    member_BUX = (parts_BU[..., None] == jnp.arange(1, X + 1)).astype(jnp.float32)
    kind_BUT = member_BUX @ jax.nn.one_hot(kinds_BX, len(PART_KINDS))
    score_BPQU = jnp.exp(self.sharpness[...]) * size**0.5 * cosine_BPQU - self.least[...]
    score_BPQU += (kind_BUT @ self.kind_score[...])[:, None, None]
    weight_BPQU = jnp.exp(score_BPQU)
    value_BUV += kind_BUT @ self.kind_value_V[...]
    own_BUXV = member_BUX[..., None] * value_BUV[:, :, None]
    return Evidence(
      jnp.einsum("bpqu,bux->bxpq", weight_BPQU, member_BUX),
      jnp.einsum("bpqu,buxv->bxpqv", weight_BPQU, own_BUXV),
    )

  @_exact
  def logits(self, evidence: Evidence):
    """Log-odds of negative, neutral and positive [..., P, K]; P̃ is their softmax."""
    # Beside something that never matches, of mass 1, little evidence counts little.
    value_PQV = evidence.value_PQV / (1 + evidence.mass_PQ)[..., None]
    return self.bias_PK[...] + jnp.einsum("...pqv,qvk->...pk", value_PQV, self.out_QVK[...])

  @_exact
  def tokens(self, preferences_PK):
    """Bridge tokens [..., P, D], float32, of given P̃ [..., P, K]."""
    return jnp.einsum("...pk,pkd->...pd", preferences_PK, self.token_PKD[...])


def add_bridge(model, dimensions: int, *, size: int, rngs: nnx.Rngs) -> None:
  """Gives a Decoder a bridge over so many dimensions.

  Raises:
    ValueError: the size is not positive.
  """
  if size < 1:
    raise ValueError(f"config.bridge.size is {size}; set it to 1 or more.")
  model.bridge = Bridge(dimensions, model.arch.width, size=size, rngs=rngs)


def infer(model, personas: Personas):
  """Log-odds of the directions, from the persona region of packed rows.

  Returns:
    [B, E, P, K] of each example's persona, and [B, X, P, K] of each part alone.
  """
  evidence = read(model, personas)
  examples = personas.labels_BEP.shape[1]
  member_BXE = (personas.segments_BX[..., None] == jnp.arange(1, examples + 1)).astype(jnp.float32)
  whole = Evidence(
    jnp.einsum("bxpq,bxe->bepq", evidence.mass_PQ, member_BXE),
    jnp.einsum("bxpqv,bxe->bepqv", evidence.value_PQV, member_BXE),
  )
  return model.bridge.logits(whole), model.bridge.logits(evidence)


def read(model, personas: Personas) -> Evidence:
  """What each part of personas says: [B, X, …]."""
  hidden_BUD, embedded_BUD = encoded(model, personas)
  return model.bridge.evidence(hidden_BUD, embedded_BUD, personas.parts_BU, personas.kinds_BX)


def encoded(model, personas: Personas):
  """The final hidden states and the embeddings of a persona region's tokens [B, U, D]."""
  hidden_BUD = model(personas.tokens_BU, personas.positions_BU, personas.parts_BU)
  embedded_BUD = embed(personas.tokens_BU, model.embedding_VD[...], model.compute_dtype)
  return tuple(constrain(x, ROWS, None, None) for x in (hidden_BUD, embedded_BUD))


def insert(model, rows: Rows, preferences_BEPK):
  """Bridge tokens of rows, which stand before the context region.

  They are a set: all at the position before the prompt's first. A dimension that is almost
  surely neutral says nothing: its token is of no segment, so nobody sees it.

  Returns:
    tokens_BTD to insert, T = E · P, and positions and segments [B, T + C + 2R].
  """
  B, E, P, _ = preferences_BEPK.shape
  tokens_BTD = model.bridge.tokens(preferences_BEPK).reshape(B, E * P, -1)
  number_BE1 = jnp.where(rows.weight_BE > 0, jnp.arange(1, E + 1), 0)[..., None]
  stated_BEP = 1 - preferences_BEPK[..., 1] > LEAST
  segments_BT = (number_BE1 * stated_BEP).reshape(B, E * P).astype(jnp.int32)
  positions_BL = rows.positions_BL + (rows.segments_BL > 0)
  return (
    tokens_BTD,
    jnp.concatenate([jnp.zeros_like(segments_BT), positions_BL], axis=1),
    jnp.concatenate([segments_BT, rows.segments_BL], axis=1),
  )


def _unit(x):
  return x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + 1e-12)
