"""A latent user variable, as in variational preference learning (VPL, Poddar et al. 2024).

An encoder reads the pairs that a user compared, each embedded by the decoder, and gives a normal
distribution over z, a few numbers for the user; of no pairs it gives the prior, N(0, I). z enters
the policy as soft tokens (Lester et al. 2021): the embeddings of the prompt's first tokens, moved
by a linear map of z. The map starts at zero, as an adapter does, so the policy starts as the
reference; and z = 0, the mean of all users, always leaves the prompt as it is.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from alignx_jax.data.rows import Personas, Rows
from alignx_jax.models.bridge import BridgeParam, encoded
from alignx_jax.models.parallel import ROWS, constrain
from alignx_jax.personas.prompts import PART_KINDS

CHOSEN, REJECTED = PART_KINDS.index("chosen"), PART_KINDS.index("rejected")
# Position of the first soft token: models lean on the very first one, so that stays.
FIRST = 1


class Posterior(NamedTuple):
  """q(z | a user's pairs), normal and independent in each dimension; float32."""

  mean_BEZ: jax.Array
  log_variance_BEZ: jax.Array


class Latent(nnx.Module):
  """The parameters of the encoder and of the map from z to soft tokens, float32.

  They are of the kind BridgeParam: trained beside an adapter, and no part of the base.

  Attributes:
    pair_SM: S = 4 D, of what embeds a pair: see posterior.
    token_ZTD: from z to what moves each of T soft tokens.
  """

  def __init__(self, model_width: int, *, size: int, tokens: int, width: int, rngs: nnx.Rngs):
    D, Z, T, M = model_width, size, tokens, width

    def normal(*shape):
      value = jax.random.normal(rngs.params(), shape, jnp.float32)
      return BridgeParam(shape[0] ** -0.5 * value)

    self.pair_SM = normal(4 * D, M)
    self.pair_bias_M = BridgeParam(jnp.zeros((M,)))
    self.score_M = normal(M)
    self.mean_MZ = normal(M, Z)
    self.log_variance_MZ = BridgeParam(jnp.zeros((M, Z)))
    self.token_ZTD = BridgeParam(jnp.zeros((Z, T, D)))

  def posterior(self, hidden_BUD, embedded_BUD, personas: Personas, examples: int) -> Posterior:
    """q(z | pairs) of each example of packed rows.

    A response is embedded as the mean of its tokens' hidden states and embeddings; a pair by
    what its responses have in common and what sets the chosen one apart. Attention with a learned
    query pools a user's pairs, beside nothing: few pairs say less than many.

    Args:
      hidden_BUD: the decoder's final hidden states of the persona region.
      embedded_BUD: its tokens' embeddings.
      examples: E.
    """
    X = personas.kinds_BX.shape[1]
    member_BUX = (personas.parts_BU[..., None] == jnp.arange(1, X + 1)).astype(jnp.float32)
    states = [hidden_BUD.astype(jnp.float32), _scaled(embedded_BUD.astype(jnp.float32))]
    sum_BXS = jnp.einsum("bux,bus->bxs", member_BUX, jnp.concatenate(states, axis=-1))
    part_BXS = sum_BXS / jnp.maximum(member_BUX.sum(axis=1), 1)[..., None]
    after = lambda x: jnp.roll(x, -1, axis=1)  # a rejected response stands after its chosen one
    kinds_BX, segments_BX = personas.kinds_BX, personas.segments_BX
    pair_BX = (kinds_BX == CHOSEN) & (after(kinds_BX) == REJECTED)
    pair_BX &= segments_BX == after(segments_BX)
    both = [_scaled(part_BXS + after(part_BXS)), _scaled(part_BXS - after(part_BXS))]
    pair_BXM = jnp.concatenate(both, axis=-1) @ self.pair_SM[...] + self.pair_bias_M[...]
    pair_BXM = jax.nn.gelu(pair_BXM)
    member_BEX = segments_BX[:, None] == jnp.arange(1, examples + 1)[:, None]
    score_BX = pair_BXM @ self.score_M[...]
    score_BEX = jnp.where(member_BEX & pair_BX[:, None], score_BX[:, None], -jnp.inf)
    beside = jnp.pad(score_BEX, ((0, 0), (0, 0), (0, 1)))  # the nothing, of score 0
    weight_BEX = jax.nn.softmax(beside, axis=-1)[..., :-1]
    pooled_BEM = jnp.einsum("bex,bxm->bem", weight_BEX, pair_BXM)
    return Posterior(pooled_BEM @ self.mean_MZ[...], pooled_BEM @ self.log_variance_MZ[...])


def add_latent(model, *, size: int, tokens: int, width: int, rngs: nnx.Rngs) -> None:
  """Gives a Decoder a latent user variable of Z = size dimensions and so many soft tokens."""
  model.latent = Latent(model.arch.width, size=size, tokens=tokens, width=width, rngs=rngs)


def encode(model, rows: Rows) -> Posterior:
  """q(z | pairs) of each example, from the persona region of packed rows."""
  hidden_BUD, embedded_BUD = encoded(model, rows.personas)
  with jax.default_matmul_precision("highest"):
    examples = rows.weight_BE.shape[-1]
    return model.latent.posterior(hidden_BUD, embedded_BUD, rows.personas, examples)


def moves(model, rows: Rows, latent_BEZ):
  """What z adds to the embedded tokens of rows [B, L, D], float32: soft tokens alone are moved.

  A prompt shorter than the soft tokens has fewer.
  """
  B, E, _ = latent_BEZ.shape
  T, D = model.latent.token_ZTD.shape[1:]
  with jax.default_matmul_precision("highest"):
    token_BETD = jnp.einsum("bez,ztd->betd", latent_BEZ, model.latent.token_ZTD[...])
  context = rows.tokens_BL.shape[1] - 2 * rows.targets_BNR.shape[-1]
  segments_BC, place_BC = rows.segments_BL[:, :context], rows.positions_BL[:, :context] - FIRST
  soft_BC = (segments_BC > 0) & (place_BC >= 0) & (place_BC < T)
  index_BC = jnp.where(soft_BC, (segments_BC - 1) * T + place_BC, -1)  # −1 is no token
  token_BSD = constrain(token_BETD.reshape(B, E * T, D), ROWS, None, None)
  moved_BCD = jax.nn.one_hot(index_BC, E * T) @ token_BSD
  rest = rows.tokens_BL.shape[1] - context
  return jnp.pad(moved_BCD, ((0, 0), (0, rest), (0, 0)))


def _scaled(x):
  """To a root mean square of 1, or less where there is almost nothing."""
  return x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + 1e-4)
