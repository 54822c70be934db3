"""Persona-judge (arXiv 2504.12663): two personas answer together, and no model is trained.

One model reads a post with either persona. In each round one of them drafts γ tokens, one by one,
and the other judges them all in one pass: token t is accepted with probability
min(1, p_judge(t) / q_draft(t)). At the first rejection a token is drawn from
norm(max(0, p − q)) instead; where all are accepted, one more from p. Then they change places.
Distributions are those after temperature, top-k and top-p.

Where they do not (alternate=False), what comes out is distributed as the judge's own responses
(Leviathan et al. 2023), which is how this file is tested.

Both sides keep their caches; what was read of a rejected token is written over. A side that comes
to speak reads its last two tokens first, so that nothing it lacks is missing: of γ accepted tokens
the drafter has not read the last.
"""

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from alignx_jax.inference.decoding import Generator, Started
from alignx_jax.inference.kv_cache import Cache, Reader, bucket
from alignx_jax.inference.prompts import (
  Generated,
  Prompt,
  common_prefixes,
  input_arrays,
  plan_batches,
)
from alignx_jax.inference.sampling import (
  Settings,
  at_step,
  draw_tokens,
  filtered_log_probs,
  keys_of,
  logits_of,
)
from alignx_jax.training import mesh as meshes

# What the paper samples with.
TEMPERATURE, TOP_K, TOP_P = 0.9, 20, 0.9


@dataclasses.dataclass(frozen=True)
class Judging:
  """How the personas take turns.

  Attributes:
    gamma: tokens of a draft.
    alternate: they change places after each round; else the first always drafts.
    compat: "release" does as the published code: they change places once, after the first round,
      and where Σ (p − q), which is 0 but for rounding, is not above 0, a token that stands for
      a rejected one is drawn from norm(max(0, q − p)).
  """

  gamma: int = 4
  alternate: bool = True
  compat: str = ""

  def __post_init__(self):
    if isinstance(self.gamma, bool) or not isinstance(self.gamma, int) or self.gamma < 1:
      raise ValueError(f"gamma is {self.gamma!r}; give a whole number of tokens, 1 or more.")
    if self.compat not in ("", "release"):
      raise ValueError(f"compat is {self.compat!r}; give 'release', or '' for the method as told.")
    if self.compat and not self.alternate:
      raise ValueError("compat 'release' says who drafts; leave alternate as it is.")


class Judged(NamedTuple):
  """A response of two personas.

  Attributes:
    accepted, judged: drafted tokens that were accepted, and that were looked at.
    passes: forward passes of the row, drafts and judgements, beside the two of the prompts.
  """

  response: Generated
  accepted: int
  judged: int
  passes: int

  @property
  def acceptance(self) -> float:
    """Share of the drafted tokens looked at that were accepted."""
    return self.accepted / self.judged

  @property
  def passes_per_token(self) -> float:
    """Forward passes for each token of the response."""
    return self.passes / self.response.tokens


def totals(found: Sequence[Judged]) -> dict[str, float]:
  """Acceptance and passes a token of all responses together, as a row of a table."""
  tokens = sum(x.response.tokens for x in found)
  return {
    "responses": len(found),
    "tokens": tokens,
    "acceptance": sum(x.accepted for x in found) / sum(x.judged for x in found),
    "passes_per_token": sum(x.passes for x in found) / tokens,
  }


class Side(NamedTuple):
  """One persona's view of the rows.

  Attributes:
    last_B, position_B: the prompt's last token and its position.
  """

  cache: Cache
  last_B: jax.Array
  position_B: jax.Array


class Rows(NamedTuple):
  """What both have agreed on.

  Attributes:
    tokens_BR: from index 1 on, what was drawn; the prompt's last token is at 0.
    count_B: tokens drawn.
    seed_B, settings, limit_B, ended_B: as in programs.Decoding.
    stats_3B: accepted, judged, passes.
    round: a scalar.
  """

  tokens_BR: jax.Array
  count_B: jax.Array
  seed_B: jax.Array
  settings: Settings
  limit_B: jax.Array
  ended_B: jax.Array
  stats_3B: jax.Array
  round: jax.Array

  @property
  def is_done_B(self):
    return self.ended_B | (self.count_B >= self.limit_B)


def judge(
  generator: Generator,
  pairs: Sequence[tuple[Prompt, Prompt]],
  judging: Judging = Judging(),
) -> Iterator[tuple[int, Judged]]:
  """Responses with the indices of their pairs, batch by batch.

  Args:
    pairs: a post with the persona that drafts first, and with the one that judges first; sampled
      as the first one says.

  Raises:
    ValueError: a prompt cannot be answered; before any is.
  """
  for prompt in (prompt for pair in pairs for prompt in pair):
    generator.check(prompt)
  sides = [list(side) for side in zip(*pairs, strict=True)]
  prefixes = [common_prefixes(side) for side in sides]
  for indices in plan_batches(sides[0], generator.rows) if pairs else ():
    batch = [[side[i] for i in indices] for side in sides]
    room = bucket(max(prompt.sampling.max_new_tokens for prompt in batch[0]) + judging.gamma + 2)
    started = [generator.start(*side, room) for side in zip(batch, prefixes, strict=True)]
    found = _judge_batch(generator, batch[0], started, room, judging)
    tokens_BR, count_B, ended_B, stats_3B = map(np.asarray, found)
    for row, index in enumerate(indices):
      count, ended = int(count_B[row]), bool(ended_B[row])
      ids = tokens_BR[row, 1 : 1 + count - ended].tolist()
      yield index, Judged(Generated(ids, ended, count), *stats_3B[:, row].tolist())


def _judge_batch(generator, prompts, started: list[Started], room: int, judging: Judging):
  rows, mesh = len(started[0].input_B), generator.reader.mesh
  seed_B, settings, limit_B = input_arrays(prompts, rows)
  by_row = lambda x: jax.device_put(x, meshes.rows_sharding(mesh, rows))
  whole = lambda x: jax.device_put(x, meshes.replicated(mesh))
  zeros = lambda *shape: np.zeros(shape, np.int32)
  of_rows = by_row((zeros(rows, room), zeros(rows), seed_B, settings, limit_B, zeros(rows) > 0))
  state = Rows(*of_rows, whole(zeros(3, rows)), whole(np.int32(0)))
  sides = [Side(x.cache, *by_row((x.input_B, x.position_B))) for x in started]
  slots = tuple(x.slot for x in started)
  program = judge_program(generator.reader, generator.stop_ids, generator.vocab, slots, judging)
  with jax.set_mesh(mesh):
    return program(generator.weights, *sides, state)


@functools.cache
def judge_program(
  reader: Reader,
  stop_ids: tuple[int, ...],
  vocab: int,
  slots: tuple[int, int],
  judging: Judging,
):
  """(weights, first Side, second Side, Rows) to tokens_BR, count_B, ended_B and stats_3B.

  Args:
    slots: where the response begins in the cache of each side.
  """

  def run(weights, first, second, rows):
    positions = first.position_B, second.position_B
    # The caches alone change.
    last = first.last_B, second.last_B

    def turn(caches, rows, drafter):
      """A round in which side `drafter` drafts."""
      views = [_View(reader, weights, slots[i], last[i], positions[i], vocab) for i in (0, 1)]
      order = (drafter, 1 - drafter)
      (draft, judge), rows = _round(
        *(views[i] for i in order), *(caches[i] for i in order), rows, stop_ids, judging
      )
      return ((draft, judge) if drafter == 0 else (judge, draft)), rows

    def turns(carry, drafters):
      for drafter in drafters:
        carry = turn(*carry, drafter)
      return carry

    carry = (first.cache, second.cache), rows
    if judging.compat:
      carry, drafters = turns(carry, (0,)), (1,)
    else:
      # Two rounds in one body: to exchange the caches would copy them.
      drafters = (0, 1) if judging.alternate else (0,)
    more = lambda carry: ~jnp.all(carry[1].is_done_B)
    _, rows = jax.lax.while_loop(more, lambda carry: turns(carry, drafters), carry)
    found = rows.tokens_BR, rows.count_B, rows.ended_B, rows.stats_3B
    return jax.lax.with_sharding_constraint(found, meshes.replicated(reader.mesh))

  return jax.jit(run)


class _View(NamedTuple):
  """How a side reads tokens by their index in the response, where its last prompt token is 0."""

  reader: Reader
  weights: object
  slot: int
  last_B: jax.Array
  position_B: jax.Array
  vocab: int

  def read(self, cache: Cache, tokens_BR, index_B, count: int):
    """Logits after `count` tokens from an index of each row on [B, count, V], and the cache."""
    take = lambda tokens_R, index: jax.lax.dynamic_slice(tokens_R, (index,), (count,))
    tokens_BS = jax.vmap(take)(tokens_BR, index_B)
    index_BS = index_B[:, None] + jnp.arange(count)
    tokens_BS = jnp.where(index_BS == 0, self.last_B[:, None], tokens_BS)
    hidden_BSD, cache = self.reader.read(
      self.weights,
      cache,
      self.reader.embed(self.weights, tokens_BS),
      self.position_B[:, None] + index_BS,
      jnp.ones_like(tokens_BS, bool),
      self.slot + index_B,
    )
    return hidden_BSD, cache

  def log_probs(self, hidden_BSD, settings: Settings):
    """Of what follows each token, after temperature, top-k and top-p [B, S, V]."""
    return filtered_log_probs(logits_of(hidden_BSD, self.weights.head_DV, self.vocab), settings)


def _round(draft: _View, judge: _View, draft_cache, judge_cache, rows: Rows, stop_ids, judging):
  """The caches and the Rows after a round."""
  gamma, count_B = judging.gamma, rows.count_B
  keys_B = at_step(keys_of(rows.seed_B), rows.round)
  rows_B = jnp.arange(len(count_B))

  # Whoever lacks one of the last two tokens reads it now.
  before_B = jnp.maximum(count_B - 1, 0)
  at_last_B = count_B - before_B
  hidden_BSD, draft_cache = draft.read(draft_cache, rows.tokens_BR, before_B, 2)
  hidden_B1D = jnp.take_along_axis(hidden_BSD, at_last_B[:, None, None], axis=1)

  def draw(tokens_BR, hidden_B1D, i):
    log_q_BV = draft.log_probs(hidden_B1D, rows.settings)[:, 0]
    token_B = draw_tokens(at_step(keys_B, i), log_q_BV)
    return tokens_BR.at[rows_B, count_B + 1 + i].set(token_B), log_q_BV

  def draft_one(carry, i):
    tokens_BR, cache = carry
    hidden_B1D, cache = draft.read(cache, tokens_BR, count_B + i, 1)
    tokens_BR, log_q_BV = draw(tokens_BR, hidden_B1D, i)
    return (tokens_BR, cache), log_q_BV

  tokens_BR, log_q_BV = draw(rows.tokens_BR, hidden_B1D, 0)
  (tokens_BR, draft_cache), log_q_SBV = jax.lax.scan(
    draft_one, (tokens_BR, draft_cache), jnp.arange(1, gamma)
  )
  log_q_BSV = jnp.concatenate([log_q_BV[None], log_q_SBV]).swapaxes(0, 1)

  hidden_BSD, judge_cache = judge.read(judge_cache, tokens_BR, before_B, gamma + 2)
  index_BS1 = (at_last_B[:, None] + jnp.arange(gamma + 1))[..., None]
  hidden_BSD = jnp.take_along_axis(hidden_BSD, index_BS1, axis=1)
  log_p_BSV = judge.log_probs(hidden_BSD, rows.settings)  # S = γ + 1

  drafted_BS = jax.vmap(lambda tokens_R, i: jax.lax.dynamic_slice(tokens_R, (i,), (gamma,)))(
    tokens_BR, count_B + 1
  )
  chance = lambda log_BSV: jnp.take_along_axis(log_BSV[:, :gamma], drafted_BS[..., None], 2)[..., 0]
  uniform = lambda key: jax.random.uniform(key, (gamma,))
  log_u_BS = jnp.log(jax.vmap(uniform)(at_step(keys_B, gamma)))
  is_accepted_BS = log_u_BS < chance(log_p_BSV) - chance(log_q_BSV)
  accepted_B = jnp.sum(jnp.cumprod(is_accepted_BS, axis=1), axis=1)

  log_probs_BV = _after_accepted(log_p_BSV, log_q_BSV, accepted_B, judging)
  token_B = draw_tokens(at_step(keys_B, gamma + 1), log_probs_BV)
  tokens_BR = tokens_BR.at[rows_B, count_B + 1 + accepted_B].set(token_B)

  # A response ends at its first end, or at its limit, though more was agreed on.
  index_S = jnp.arange(gamma + 1)
  new_BS = jax.vmap(lambda tokens_R, i: jax.lax.dynamic_slice(tokens_R, (i,), (gamma + 1,)))(
    tokens_BR, count_B + 1
  )
  is_new_BS = index_S <= accepted_B[:, None]
  is_new_BS &= (count_B[:, None] + index_S < rows.limit_B[:, None]) & ~rows.is_done_B[:, None]
  is_stop_BS = jnp.isin(new_BS, jnp.array(stop_ids, jnp.int32)) & is_new_BS
  is_new_BS &= jnp.cumsum(is_stop_BS, axis=1) - is_stop_BS == 0
  judged_B = accepted_B + (accepted_B < gamma)
  stats_3B = jnp.stack([accepted_B, judged_B, jnp.full_like(judged_B, gamma + 1)])
  return (draft_cache, judge_cache), rows._replace(
    tokens_BR=jnp.where(rows.is_done_B[:, None], rows.tokens_BR, tokens_BR),
    count_B=count_B + jnp.sum(is_new_BS, axis=1),
    ended_B=rows.ended_B | (is_stop_BS & is_new_BS).any(axis=1),
    stats_3B=rows.stats_3B + jnp.where(rows.is_done_B, 0, stats_3B),
    round=rows.round + 1,
  )


def _after_accepted(log_p_BSV, log_q_BSV, accepted_B, judging: Judging):
  """What the token after the accepted ones is drawn from [B, V], as logarithms."""
  take = lambda x_BSV, i_B: jnp.take_along_axis(x_BSV, i_B[:, None, None], axis=1)[:, 0]
  log_p_BV = take(log_p_BSV, accepted_B)
  p_BV = jnp.exp(log_p_BV)
  q_BV = jnp.exp(take(log_q_BSV, jnp.minimum(accepted_B, judging.gamma - 1)))
  rest_BV = jnp.maximum(p_BV - q_BV, 0.0)
  if judging.compat == "release":
    is_opposite_B1 = jnp.sum(p_BV - q_BV, axis=-1, keepdims=True) <= 0
    rest_BV = jnp.where(is_opposite_B1, jnp.maximum(q_BV - p_BV, 0.0), rest_BV)
  # Nothing is rejected where p is q; rounding may still leave nothing.
  is_whole_B1 = (accepted_B == judging.gamma)[:, None] | ~jnp.any(
    rest_BV > 0, axis=-1, keepdims=True
  )
  return jnp.where(is_whole_B1, log_p_BV, jnp.log(rest_BV))
