"""Losses weighted by group: all groups alike, or the worst most (group DRO).

The mean loss is ruled by the groups that are many. Here group g has a weight q_g instead, whatever
its size: the objective is Σ_g q_g E_g[loss].
"""

import dataclasses

import jax
import jax.numpy as jnp

from alignx_jax.data.groups import Grouping


@dataclasses.dataclass(frozen=True)
class GroupObjective:
  """How groups are weighted; hashable.

  Attributes:
    names: of the groups.
    shares: of the training examples that are in each, p_g.
    step_size: η of group DRO, per nat; 0 keeps the weights equal.
  """

  names: tuple[str, ...]
  shares: tuple[float, ...]
  step_size: float

  @classmethod
  def of(cls, objective, grouping: Grouping | None) -> "GroupObjective | None":
    """Of a config's `objective`; None without groups."""
    if grouping is None:
      return None
    return cls(grouping.names, grouping.shares, objective.group_step or 0.0)

  def start(self):
    """The weights q [G] before the first step: equal."""
    return jnp.full(len(self.names), 1 / len(self.names), jnp.float32)

  def loss_sum(self, loss_BE, group_BE, weight_BE, weights_G):
    """The sum to differentiate, and each group's plain loss.

    An example counts q_g / p_g times, so that the mean over a batch is Σ_g q_g E_g[loss] on
    average, however few of a group a batch has. One in no group (−1) counts once.

    Args:
      loss_BE: of each example.
      group_BE: its group's number.
      weight_BE: 1 for a real example, 0 for an empty slot.
      weights_G: q, of which no gradient is taken.
    Returns:
      A scalar, and metrics as (numerator, denominator) pairs, "loss/NAME" of each group.
    """
    ratio_G = weights_G / jnp.asarray(self.shares, jnp.float32)
    emphasis_BE = jnp.where(group_BE < 0, 1.0, ratio_G[jnp.maximum(group_BE, 0)])
    # `where`, not a product: an empty slot must not turn a non-finite value into NaN.
    total = jnp.sum(jnp.where(weight_BE > 0, weight_BE * emphasis_BE * loss_BE, 0.0))
    metrics = {}
    for g, name in enumerate(self.names):
      is_BE = (weight_BE > 0) & (group_BE == g)
      losses = jnp.sum(jnp.where(is_BE, loss_BE, 0.0)), jnp.sum(is_BE).astype(jnp.float32)
      metrics[f"loss/{name}"] = losses
    return total, metrics

  def updated(self, weights_G, metrics):
    """q_g ← q_g exp(η loss_g), normalised (Sagawa et al. 2020, algorithm 1).

    loss_g is the batch's sum over the group by the number that it has on average, N p_g: right on
    average, though a group that is rare is not in every batch. A mean would let those groups win
    that are always there. The step's own gradient has the q before, as the losses of a step in
    parts are known only when its gradient is; algorithm 1 has the one after.

    Args:
      metrics: of the whole step, over all devices and parts: "loss", and those of loss_sum.
    """
    examples = jnp.maximum(metrics["loss"][1], 1)
    sum_G = jnp.stack([metrics[f"loss/{name}"][0] for name in self.names])
    loss_G = sum_G / (examples * jnp.asarray(self.shares, jnp.float32))
    return jax.nn.softmax(jnp.log(weights_G) + self.step_size * loss_G)
