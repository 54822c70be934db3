"""Preference-bridged alignment with a learned bridge: persona → P̃ → response, trained as one.

The loss of an example is DPO's, of responses given P̃, plus λ times the cross-entropy of P̃
with the record's preference directions, where the record has any. What the head makes of each
act alone is held against that act's directions too: a user's acts teach more than the sum.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from alignx_jax.data.rows import Personas
from alignx_jax.models.bridge import TABLES, infer
from alignx_jax.objectives.draws import draw_each
from alignx_jax.objectives.log_probs import response_log_probs


@dataclasses.dataclass(frozen=True)
class BridgeObjective:
  """How a learned bridge is trained; hashable.

  Attributes:
    label_weight: λ, of the cross-entropy in nats a person, summed over the dimensions.
    act_weight: of the mean cross-entropy of a person's acts, relative to that of the person.
    class_weights: of the cross-entropy of dimensions that are negative, neutral, positive. Most
      are neutral.
    forcing: share of the labelled examples whose policy reads the label instead of P̃, at the
      first step and after `forcing_steps`; in between it changes linearly.
    dpo_gradient: whether the DPO loss trains the head too, through P̃.
    seed: of which examples are forced.
    rows: indices of the dimensions that alone are trained; None for all and what they share.
  """

  label_weight: float
  act_weight: float
  class_weights: tuple[float, float, float]
  forcing: tuple[float, float]
  dpo_gradient: bool
  forcing_steps: float
  seed: int
  rows: tuple[int, ...] | None = None


def bridged_log_probs(model, rows, objective: BridgeObjective, step, *, chunk: int):
  """Response log-probs given P̃ as it enters the policy, and the head's loss.

  Args:
    step: of the run, an int32 scalar.
  Returns:
    log-probs [B, N, E], λ times the head's loss of each example [B, E] (0 where it has no
    labels), and metrics as (numerator, denominator) pairs.
  """
  personas = rows.personas
  logits_BEPK, act_logits_BXPK = infer(model, personas)
  known_BE = (personas.labels_BEP >= 0).any(axis=-1)
  known_BX = (personas.acts_BXP >= 0).any(axis=-1)
  label_loss_BE = balanced_cross_entropy(logits_BEPK, personas.labels_BEP, objective.class_weights)
  act_loss_BX = balanced_cross_entropy(act_logits_BXPK, personas.acts_BXP, objective.class_weights)
  # An example's mean over its acts.
  member_BXE = personas.segments_BX[..., None] == jnp.arange(1, known_BE.shape[-1] + 1)
  acts_BE = jnp.sum(jnp.where(member_BXE, known_BX[..., None], 0), axis=1)
  act_loss_BE = jnp.sum(jnp.where(member_BXE, act_loss_BX[..., None], 0.0), axis=1)
  head_loss_BE = label_loss_BE + objective.act_weight * act_loss_BE / jnp.maximum(acts_BE, 1)
  inferred_BEPK = jax.nn.softmax(logits_BEPK)
  if not objective.dpo_gradient:
    inferred_BEPK = jax.lax.stop_gradient(inferred_BEPK)
  first, last = objective.forcing
  share = first + (last - first) * jnp.minimum(step / max(1.0, objective.forcing_steps), 1.0)
  drawn_BE = draw_each(jax.random.uniform, objective.seed, step, rows.example_BE) < share
  labels_BEP = _labels_of_users(personas, member_BXE)
  forced_BEP = drawn_BE[..., None] & (labels_BEP >= 0)
  taught_BEPK = jax.nn.one_hot(labels_BEP, 3)
  preferences_BEPK = jnp.where(forced_BEP[..., None], taught_BEPK, inferred_BEPK)
  log_probs_BNE = response_log_probs(model, rows, preferences_BEPK, chunk=chunk)

  def mean_where(value, where):
    return jnp.sum(jnp.where(where, value, 0.0)), jnp.sum(where).astype(jnp.float32)

  stated_BEP = (personas.labels_BEP == 0) | (personas.labels_BEP == 2)
  labels_BEPK = jax.nn.one_hot(personas.labels_BEP, 3)
  of_label_BEP = jnp.sum(labels_BEPK * jax.nn.softmax(logits_BEPK), axis=-1)
  metrics = {
    "label_loss": mean_where(label_loss_BE, known_BE),
    "act_loss": mean_where(act_loss_BX, known_BX),
    "label_probability": mean_where(of_label_BEP, stated_BEP),
    "forced": mean_where(forced_BEP.any(axis=-1), rows.weight_BE > 0),
  }
  return log_probs_BNE, objective.label_weight * head_loss_BE, metrics


def _labels_of_users(personas: Personas, member_BXE):
  """What the labels of the record and of the acts before it say together [B, E, P].

  A label of one pair is of the few dimensions that it is about; what a user prefers is more.
  """
  votes_BXP = jnp.maximum(personas.acts_BXP, 0) - (personas.acts_BXP >= 0)
  votes_BEP = jnp.einsum("bxe,bxp->bep", member_BXE.astype(jnp.int32), votes_BXP.astype(jnp.int32))
  # The record's own counts most.
  votes_BEP += 64 * (jnp.maximum(personas.labels_BEP, 0) - (personas.labels_BEP >= 0)).astype(int)
  known_BEP = personas.labels_BEP >= 0
  return jnp.where(known_BEP, jnp.sign(votes_BEP) + 1, -1)


def only_rows(gradient, rows: tuple[int, ...]):
  """The gradient of a bridge where nothing but these dimensions' own parameters is trained."""

  def keep(path, leaf):
    if not any(f"'{name}'" in jax.tree_util.keystr(path) for name in TABLES):
      return jnp.zeros_like(leaf)
    return jnp.zeros_like(leaf).at[jnp.array(rows)].set(leaf[jnp.array(rows)])

  return jax.tree_util.tree_map_with_path(keep, gradient)


def balanced_cross_entropy(logits_PK, labels_P, weights):
  """Class-balanced cross-entropy in nats a person, summed over the labelled dimensions [...].

  Classes of weight w are learned as if they were w times as frequent: q ∝ w · softmax(logits)
  is fitted to labels that are weighted by w. Its optimum is q ∝ w · p, hence softmax(logits)
  = p, the true frequencies: the weights say what to learn well, and P̃ stays calibrated (as the
  logit adjustment of Menon et al. 2021 does).

  Args:
    labels_P: 0, 1 or 2; −1 where not known.
  """
  weights_K = jnp.asarray(weights, jnp.float32)
  log_q_PK = jax.nn.log_softmax(logits_PK + jnp.log(weights_K))
  return -jnp.sum(jax.nn.one_hot(labels_P, 3) * weights_K * log_q_PK, axis=(-2, -1))


def class_weights(labels_XP, balance: float) -> tuple[float, float, float]:
  """Weights of negative, neutral and positive: frequency^(−balance), 1 on average over labels.

  Args:
    labels_XP: 0, 1 or 2; −1 where not known.
    balance: 0 weighs all labels alike, 1 all classes.
  """
  shares = class_shares(labels_XP)
  weights = shares**-balance
  return tuple((weights / (shares * weights).sum()).tolist())


def class_shares(labels_XP):
  """How frequent negative, neutral and positive are [3], one label of each counted beside."""
  counts = [1 + (labels_XP == value).sum() for value in range(3)]
  return np.array(counts, np.float64) / sum(counts)
