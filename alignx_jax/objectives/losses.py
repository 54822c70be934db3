"""Losses on log-probabilities: pure functions that know nothing of models."""

import jax
import jax.numpy as jnp


def dpo_loss(policy_BNE, reference_BNE, weight_BE, *, beta: float):
  """DPO (Rafailov et al. 2023, eq. 7): −log σ(β [log-ratio of chosen − of rejected]).

  Args:
    policy_BNE: summed response log-probs in nats; branch 0 chosen, 1 rejected.
    reference_BNE: the same under the frozen reference.
    weight_BE: 1 for a real example, 0 for an empty slot.
    beta: strength of the pull towards the reference, per nat.
  Returns:
    The loss to differentiate as a (numerator, denominator) pair of scalars, and metrics
    as such pairs: sum over devices and steps, then divide once.
  """
  ratio_BNE = policy_BNE - reference_BNE
  margin_BE = beta * (ratio_BNE[:, 0] - ratio_BNE[:, 1])
  examples = jnp.sum(weight_BE)

  def mean(value_BE):
    # `where`, not a product: an empty slot must not turn a non-finite value into NaN.
    return jnp.sum(jnp.where(weight_BE > 0, weight_BE * value_BE, 0.0)), examples

  loss = mean(-jax.nn.log_sigmoid(margin_BE))
  metrics = {
    "loss": loss,
    "reward_accuracy": mean((margin_BE > 0).astype(jnp.float32)),
    "margin": mean(margin_BE),
    "chosen_reward": mean(beta * ratio_BNE[:, 0]),
    "rejected_reward": mean(beta * ratio_BNE[:, 1]),
  }
  return loss, metrics
