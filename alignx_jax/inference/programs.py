"""The compiled programs of decoding: prefixes read, prompts read, tokens drawn."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from alignx_jax.inference.kv_cache import Cache, Reader
from alignx_jax.inference.sampling import Settings, at_step, keys_of, logits_of, sample
from alignx_jax.models.bridge import LEAST
from alignx_jax.training import mesh as meshes


class Decoding(NamedTuple):
  """Rows that are being answered.

  Attributes:
    tokens_BR: what was drawn.
    input_B, position_B: the token to read next, and its position.
    limit_B: the most tokens.
    count_B: drawn so far.
    ended_B: whether the last one was an end.
    step: tokens drawn of the longest row, a scalar.
  """

  cache: Cache
  tokens_BR: jax.Array
  input_B: jax.Array
  position_B: jax.Array
  seed_B: jax.Array
  settings: Settings
  limit_B: jax.Array
  count_B: jax.Array
  ended_B: jax.Array
  step: jax.Array


@functools.cache
def prefix_program(reader: Reader):
  """(weights, bridge tokens, ids [U, C], lengths [U], P̃ [U, P, K]) to the Cache of prefixes."""

  def read(weights, token_PKD, tokens_UC, lengths_U, preferences_UPK):
    U, C = tokens_UC.shape
    bridge = 0 if preferences_UPK is None else preferences_UPK.shape[1]
    cache = reader.empty(U, bridge + C)
    first_U = jnp.zeros(U, jnp.int32)
    if bridge:
      # As models.bridge.insert does.
      x_UPD = jnp.einsum("upk,pkd->upd", preferences_UPK, token_PKD, precision="highest")
      is_stated_UP = 1 - preferences_UPK[..., 1] > LEAST
      positions_UP = jnp.zeros((U, bridge), jnp.int32)
      _, cache = reader.read(weights, cache, x_UPD, positions_UP, is_stated_UP, 0)
      first_U += 1
    return reader.read_prompt(weights, cache, tokens_UC, lengths_U, first_U, bridge)

  return jax.jit(read)


@functools.cache
def start_program(reader: Reader, slots: int):
  """(weights, Cache of prefixes or None, ids [B, C], lengths, first positions, prefix of each) to a
  Cache of so many slots."""

  def read(weights, prefix, tokens_BC, lengths_B, first_B, of_B):
    cache = reader.empty(len(of_B), slots)
    start = 0
    if prefix is not None:
      start = prefix.is_seen_BT.shape[1]
      put = lambda new, old, axis: jax.lax.dynamic_update_slice_in_dim(old, new[of_B], 0, axis)
      keys = (put(*pair, 3) for pair in zip(prefix.keys, cache.keys, strict=True))
      values = (put(*pair, 2) for pair in zip(prefix.values, cache.values, strict=True))
      is_seen_BT = put(prefix.is_seen_BT, cache.is_seen_BT, 1)
      cache = Cache(tuple(keys), tuple(values), is_seen_BT)
    return reader.read_prompt(weights, cache, tokens_BC, lengths_B, first_B, start)

  return jax.jit(read)


@functools.cache
def decode_program(reader: Reader, stop_ids: tuple[int, ...], vocab: int, slot: int):
  """(weights, Decoding, steps) to the Decoding after so many steps, or when all rows are done.

  The state is given away. Beside it come tokens_BR, count_B and ended_B, whole on every device.

  Args:
    slot: the first of the response.
  """

  def decode(weights, state, stop):
    keys_B = keys_of(state.seed_B)

    def is_done(state):
      return state.ended_B | (state.count_B >= state.limit_B)

    def step(state):
      x_BSD = reader.embed(weights, state.input_B[:, None])
      is_seen_BS = jnp.ones((len(keys_B), 1), bool)
      args = x_BSD, state.position_B[:, None], is_seen_BS, slot + state.step
      hidden_BSD, cache = reader.read(weights, state.cache, *args)
      logits_BV = logits_of(hidden_BSD, weights.head_DV, vocab)[:, 0]
      token_B = sample(at_step(keys_B, state.step), logits_BV, state.settings)
      done_B = is_done(state)
      token_B = jnp.where(done_B, 0, token_B)
      put = (jnp.int32(0), state.step)
      return state._replace(
        cache=cache,
        tokens_BR=jax.lax.dynamic_update_slice(state.tokens_BR, token_B[:, None], put),
        input_B=token_B,
        position_B=state.position_B + 1,
        count_B=state.count_B + ~done_B,
        ended_B=state.ended_B | (~done_B & jnp.isin(token_B, jnp.array(stop_ids, jnp.int32))),
        step=state.step + 1,
      )

    more = lambda state: (state.step < stop) & ~jnp.all(is_done(state))
    state = jax.lax.while_loop(more, step, state)
    found = state.tokens_BR, state.count_B, state.ended_B
    return state, jax.lax.with_sharding_constraint(found, meshes.replicated(reader.mesh))

  return jax.jit(decode, donate_argnums=1)
