"""Losses on log-probabilities: pure functions that know nothing of models.

Each takes the summed response log-probs of policy and reference in nats [B, N, E] (branch 0
chosen, 1 rejected), the responses' lengths in tokens [B, N, E] and the PreferenceLoss that it is
of, and gives the rewards [B, N, E] whose difference says which response is preferred, and the
loss of each example [B, E]. LOSSES has them by name.
"""

import dataclasses

import jax
import jax.numpy as jnp


def dpo(policy_BNE, reference_BNE, lengths_BNE, loss: "PreferenceLoss"):
  """DPO (Rafailov et al. 2023, eq. 7): −log σ(m), m = β [log-ratio of chosen − of rejected].

  With label smoothing ε the conservative DPO (Mitchell 2023, eq. 3), for labels of which a
  share ε is wrong: −(1 − ε) log σ(m) − ε log σ(−m). log 2 where policy and reference are equal.
  """
  rewards_BNE = _implicit_rewards(policy_BNE, reference_BNE, loss)
  margin_BE = _margin(rewards_BNE)
  smoothing = loss.label_smoothing
  kept_BE = (1 - smoothing) * jax.nn.log_sigmoid(margin_BE)
  return rewards_BNE, -kept_BE - smoothing * jax.nn.log_sigmoid(-margin_BE)


def ipo(policy_BNE, reference_BNE, lengths_BNE, loss: "PreferenceLoss"):
  """IPO (Azar et al. 2023, eq. 17, β for its τ): (difference of log-ratios − 1/(2β))².

  Of summed log-probs, as there. 1/(4β²) where policy and reference are equal.
  """
  rewards_BNE = _implicit_rewards(policy_BNE, reference_BNE, loss)
  return rewards_BNE, (_margin(rewards_BNE) / loss.beta - 1 / (2 * loss.beta)) ** 2


def hinge(policy_BNE, reference_BNE, lengths_BNE, loss: "PreferenceLoss"):
  """Hinge (Liu et al. 2023, RSO, eq. 10, after SLiC): max(0, 1 − m), m as in DPO.

  1 where policy and reference are equal.
  """
  rewards_BNE = _implicit_rewards(policy_BNE, reference_BNE, loss)
  return rewards_BNE, jax.nn.relu(1 - _margin(rewards_BNE))


def simpo(policy_BNE, reference_BNE, lengths_BNE, loss: "PreferenceLoss"):
  """SimPO (Meng et al. 2024, eq. 6): −log σ(β/|y_w| log π(y_w) − β/|y_l| log π(y_l) − γ).

  No reference enters; `reference_BNE` may be anything.
  """
  rewards_BNE = loss.beta * policy_BNE / jnp.maximum(lengths_BNE, 1)
  return rewards_BNE, -jax.nn.log_sigmoid(_margin(rewards_BNE) - loss.target_margin)


LOSSES = {"sigmoid": dpo, "ipo": ipo, "hinge": hinge, "simpo": simpo}
REFERENCE_FREE = ("simpo",)


@dataclasses.dataclass(frozen=True)
class PreferenceLoss:
  """A loss by name with its numbers; hashable.

  Attributes:
    name: a key of LOSSES.
    beta: strength of the pull towards the reference, per nat; for SimPO the rewards' scale.
    label_smoothing: ε of `sigmoid`: the share of labels that are taken to be wrong.
    target_margin: γ of `simpo`, in units of its rewards.
    likelihood_weight: α, of the chosen response's cross-entropy per token, in nats, beside the
      loss (Pang et al. 2024, iterative RPO, eq. 2). These losses look at differences alone, which
      grow fastest where both responses become improbable; with it the policy goes on writing.
  """

  name: str = "sigmoid"
  beta: float = 0.1
  label_smoothing: float = 0.0
  target_margin: float = 0.0
  likelihood_weight: float = 0.0

  @classmethod
  def of(cls, objective) -> "PreferenceLoss":
    """Of a config's `objective`."""
    numbers = objective.beta, objective.label_smoothing, objective.target_margin
    return cls(objective.loss, *numbers, objective.likelihood_weight)

  def of_examples(self, policy_BNE, reference_BNE, lengths_BNE):
    """Rewards [B, N, E] and the loss of each example [B, E]; the arguments are those of a call."""
    rewards_BNE, loss_BE = LOSSES[self.name](policy_BNE, reference_BNE, lengths_BNE, self)
    if self.likelihood_weight:
      loss_BE -= self.likelihood_weight * policy_BNE[:, 0] / jnp.maximum(lengths_BNE[:, 0], 1)
    return rewards_BNE, loss_BE

  def __call__(self, policy_BNE, reference_BNE, lengths_BNE, weight_BE):
    """The loss to differentiate, and metrics.

    Args:
      policy_BNE: summed response log-probs in nats; branch 0 chosen, 1 rejected.
      reference_BNE: the same under the frozen reference.
      lengths_BNE: tokens of the responses.
      weight_BE: 1 for a real example, 0 for an empty slot.
    Returns:
      The loss as a (numerator, denominator) pair of scalars, and metrics as such pairs: sum over
      devices and steps, then divide once.
    """
    rewards_BNE, loss_BE = self.of_examples(policy_BNE, reference_BNE, lengths_BNE)
    margin_BE = _margin(rewards_BNE)
    examples = jnp.sum(weight_BE)

    def mean(value_BE):
      # `where`, not a product: an empty slot must not turn a non-finite value into NaN.
      return jnp.sum(jnp.where(weight_BE > 0, weight_BE * value_BE, 0.0)), examples

    loss = mean(loss_BE)
    metrics = {
      "loss": loss,
      "reward_accuracy": mean((margin_BE > 0).astype(jnp.float32)),
      "margin": mean(margin_BE),
      "chosen_reward": mean(rewards_BNE[:, 0]),
      "rejected_reward": mean(rewards_BNE[:, 1]),
    }
    return loss, metrics


def reference_kind(config) -> str:
  """config.reference.kind, or "none" if the config's loss has no reference."""
  return "none" if config.objective.loss in REFERENCE_FREE else config.reference.kind


def _implicit_rewards(policy_BNE, reference_BNE, loss):
  return loss.beta * (policy_BNE - reference_BNE)


def _margin(rewards_BNE):
  return rewards_BNE[:, 0] - rewards_BNE[:, 1]
