"""Hidden states to log-probabilities, without ever holding the logits of a whole row."""

import functools

import jax
import jax.numpy as jnp

from alignx_jax.models.bridge import insert
from alignx_jax.models.latent import moves
from alignx_jax.models.parallel import ROWS, constrain


def token_log_probs(hidden_BTD, head_VD, targets_BT, *, chunk: int = 128):
  """Log-probability in nats of each target, float32 [B, T].

  The head is applied to `chunk` positions at a time and recomputed in the backward
  pass, so [B, chunk, V] logits are the largest array. The log-sum-exp is float32
  whatever the compute type.
  """
  B, T, D = hidden_BTD.shape
  chunk = min(chunk, T)
  padding = -T % chunk
  hidden = jnp.pad(hidden_BTD, ((0, 0), (0, padding), (0, 0)))
  targets = jnp.pad(targets_BT, ((0, 0), (0, padding)))
  hidden = hidden.reshape(B, -1, chunk, D).swapaxes(0, 1)
  targets = targets.reshape(B, -1, chunk).swapaxes(0, 1)
  hidden = constrain(hidden, None, ROWS, "context", None)
  # Gathered here, once, not for each chunk.
  head_VD = constrain(head_VD.astype(hidden.dtype), "tensor", None)
  _, out = jax.lax.scan(functools.partial(_chunk_log_probs, head_VD), None, (hidden, targets))
  return out.swapaxes(0, 1).reshape(B, -1)[:, :T]


@jax.checkpoint
def _chunk_log_probs(head_VD, carry, chunk):
  hidden_BTD, targets_BT = chunk
  logits_BTV = jnp.einsum("btd,vd->btv", hidden_BTD, head_VD, preferred_element_type=jnp.float32)
  # Not take_along_axis, which would gather a vocabulary that is split over devices.
  is_target_BTV = targets_BT[..., None] == jnp.arange(head_VD.shape[0])
  picked_BT = jnp.sum(jnp.where(is_target_BTV, logits_BTV, 0.0), axis=-1)
  return carry, picked_BT - jax.nn.logsumexp(logits_BTV, axis=-1)


def response_log_probs(model, rows, preferences_BEPK=None, *, latent_BEZ=None, chunk: int = 128):
  """Summed log-probability of each response, float32 [B, N, E].

  Args:
    model: a Decoder.
    rows: data.rows.Rows.
    preferences_BEPK: P̃, which the model's bridge tells the policy; None for no bridge.
    latent_BEZ: z, which moves the policy's soft tokens; None for no latent variable, or z = 0.
    chunk: head positions at a time, see token_log_probs.
  """
  B, N, R = rows.targets_BNR.shape
  E = rows.weight_BE.shape[-1]
  tokens_BTD, positions, segments = None, rows.positions_BL, rows.segments_BL
  if preferences_BEPK is not None:
    tokens_BTD, positions, segments = insert(model, rows, preferences_BEPK)
  moved_BLD = None if latent_BEZ is None else moves(model, rows, latent_BEZ)
  hidden_BLD = model(
    rows.tokens_BL, positions, segments, response=R, bridge_BTD=tokens_BTD, moved_BLD=moved_BLD
  )
  C = hidden_BLD.shape[1] - N * R
  # Chunks run along R with the branches side by side, so that every device of a mesh
  # that splits B works in every chunk.
  hidden = constrain(hidden_BLD[:, C:], ROWS, None, None).reshape(B * N, R, -1)
  log_probs = token_log_probs(hidden, model.head, rows.targets_BNR.reshape(B * N, R), chunk=chunk)
  member_BNRE = _members(segments[:, C:].reshape(B, N, R), E)
  return jnp.sum(jnp.where(member_BNRE, log_probs.reshape(B, N, R)[..., None], 0.0), axis=2)


def response_lengths(rows):
  """Tokens of each response, of which its log-prob is the sum, int32 [B, N, E]; 0 without one."""
  B, N, R = rows.targets_BNR.shape
  segments_BNR = rows.segments_BL[:, -N * R :].reshape(B, N, R)
  return jnp.sum(_members(segments_BNR, rows.weight_BE.shape[-1]), axis=2, dtype=jnp.int32)


def _members(segments_BNR, examples):
  """Which example each response position is of [B, N, R, E]."""
  return segments_BNR[..., None] == jnp.arange(1, examples + 1)
