"""From logits to tokens: temperature, top-k, top-p; and one random stream for each request.

Everything here is the same for a row whatever stands beside it in the batch, and takes each
row's own settings as arrays, so that requests of any settings share a compiled program.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from alignx_jax.models.parallel import ROWS, constrain


class Settings(NamedTuple):
  """How each row is sampled.

  Attributes:
    temperature: float32 [B]; 0 takes the most probable token.
    top_k: int32 [B], only so many most probable tokens; 0 for all.
    top_p: float32 [B], only the fewest most probable tokens that have this probability
      together; 1 for all.
  """

  temperature: jax.Array
  top_k: jax.Array
  top_p: jax.Array


def filtered_log_probs(logits_BSV, settings: Settings):
  """Log-probs [B, S, V], float32, of what is sampled from: −inf for what never is.

  In the usual order: temperature, then top-k, then top-p of what is left (Holtzman et al. 2020).
  Of tokens that are equally probable, all are kept or none. There is no sort: the least logit
  that is kept is found bit by bit.
  """
  temperature, top_k, top_p = (x[:, None, None] for x in settings)
  logits_BSV = logits_BSV.astype(jnp.float32)
  greedy = temperature == 0
  # One token alone, the first of equals, where the temperature is 0.
  best_BS1 = jnp.argmax(logits_BSV, axis=-1, keepdims=True)
  is_best_BSV = best_BS1 == jnp.arange(logits_BSV.shape[-1])
  one_BSV = jnp.where(is_best_BSV, 0.0, -jnp.inf)
  scaled_BSV = jnp.where(greedy, one_BSV, logits_BSV / jnp.where(greedy, 1.0, temperature))

  def keep_top_k(x_BSV):
    enough = lambda is_above_BSV: jnp.sum(is_above_BSV, axis=-1, keepdims=True) >= top_k
    return jnp.where((top_k <= 0) | _is_above(x_BSV, enough), x_BSV, -jnp.inf)

  def keep_top_p(x_BSV):
    probs_BSV = jax.nn.softmax(x_BSV)
    mass = lambda is_above: jnp.sum(jnp.where(is_above, probs_BSV, 0.0), axis=-1, keepdims=True)
    is_above_BSV = _is_above(x_BSV, lambda is_above_BSV: mass(is_above_BSV) >= top_p)
    return jnp.where((top_p >= 1) | is_above_BSV, x_BSV, -jnp.inf)

  sampled = jnp.any(settings.temperature > 0)
  for used, keep in (
    (jnp.any(settings.top_k > 0), keep_top_k),
    (jnp.any(settings.top_p < 1), keep_top_p),
  ):
    scaled_BSV = jax.lax.cond(sampled & used, keep, lambda x: x, scaled_BSV)
  return jax.nn.log_softmax(scaled_BSV)


def _is_above(x_BSV, enough):
  """Where x is at least the largest threshold above which there is enough.

  Args:
    enough: from where x is at least a threshold to bool [B, S, 1]; true of all of x.
  """
  bits = jax.lax.bitcast_convert_type(x_BSV, jnp.uint32)
  # In the order of the floats they stand for.
  order_BSV = jnp.where(bits >> 31, ~bits, bits | jnp.uint32(1 << 31))

  def set_bit(i, threshold_BS1):
    higher = threshold_BS1 | (jnp.uint32(1 << 31) >> i.astype(jnp.uint32))
    return jnp.where(enough(order_BSV >= higher), higher, threshold_BS1)

  start = jnp.zeros((*x_BSV.shape[:-1], 1), jnp.uint32)
  return order_BSV >= jax.lax.fori_loop(0, 32, set_bit, start)


def sample(keys_B, logits_BV, settings: Settings):
  """A token of each row [B].

  Args:
    keys_B: of jax.random.key.
  """

  def draw():
    log_probs_BV = filtered_log_probs(logits_BV[:, None], settings)[:, 0]
    return draw_tokens(keys_B, log_probs_BV)

  # Where every row is greedy, there is nothing to draw.
  return jax.lax.cond(
    jnp.any(settings.temperature > 0), draw, lambda: jnp.argmax(logits_BV, axis=-1)
  ).astype(jnp.int32)


def draw_tokens(keys_B, log_probs_BV):
  """A token of each row [B] with these probabilities, which need not sum to 1."""
  return jax.vmap(jax.random.categorical)(keys_B, log_probs_BV).astype(jnp.int32)


def keys_of(seeds_B):
  """A random stream of each seed, uint32 [B]."""
  return jax.vmap(jax.random.key)(seeds_B)


def at_step(keys_B, step):
  """What a stream gives at a step, a scalar or [B], whatever was drawn before."""
  return jax.vmap(jax.random.fold_in)(keys_B, jnp.broadcast_to(step, keys_B.shape))


def logits_of(hidden_BSD, head_DV, vocab: int):
  """Logits [B, S, V], float32; −inf from id `vocab` on, which no tokenizer has a text for."""
  B, S, D = hidden_BSD.shape
  head_DV = head_DV.astype(hidden_BSD.dtype)
  flat = jnp.matmul(hidden_BSD.reshape(-1, D), head_DV, preferred_element_type=jnp.float32)
  logits_BSV = flat.reshape(B, S, -1)
  logits_BSV = constrain(logits_BSV, ROWS, None, "tensor")
  if vocab < head_DV.shape[1]:
    logits_BSV = jnp.where(jnp.arange(head_DV.shape[1]) < vocab, logits_BSV, -jnp.inf)
  return logits_BSV
