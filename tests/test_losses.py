"""DPO against hand-worked values."""

import jax
import jax.numpy as jnp
import numpy as np

from alignx_jax.objectives.log_probs import token_log_probs
from alignx_jax.objectives.losses import dpo_loss


def test_dpo_by_hand():
  # Log-ratios 2 and −1 at β 0.5: margin 1.5, −log σ(1.5) = log(1 + e^−1.5) = 0.2014133.
  policy_BNE = jnp.array([[[-3.0], [-6.0]]])
  reference_BNE = jnp.array([[[-5.0], [-5.0]]])
  (loss, examples), metrics = dpo_loss(policy_BNE, reference_BNE, jnp.ones((1, 1)), beta=0.5)
  np.testing.assert_allclose(loss / examples, 0.2014133, rtol=1e-6)
  np.testing.assert_allclose(metrics["margin"][0], 1.5)
  np.testing.assert_allclose(metrics["chosen_reward"][0], 1.0)
  np.testing.assert_allclose(metrics["rejected_reward"][0], -0.5)
  assert metrics["reward_accuracy"][0] == 1


def test_policy_equal_to_reference_gives_log_two_and_no_accuracy():
  scores = jnp.array([[[-3.0, -1.0], [-6.0, -1.0]]])
  (loss, examples), metrics = dpo_loss(scores, scores, jnp.ones((1, 2)), beta=0.1)
  np.testing.assert_allclose(loss / examples, np.log(2), rtol=1e-7)
  assert metrics["reward_accuracy"][0] == 0  # strict: a tie is no success


def test_empty_slots_count_nothing_even_when_not_finite():
  policy_BNE = jnp.array([[[-3.0, jnp.nan], [-6.0, jnp.nan]]])
  reference_BNE = jnp.zeros((1, 2, 2))
  weight_BE = jnp.array([[1.0, 0.0]])

  def loss(policy_BNE):
    (numerator, examples), _ = dpo_loss(policy_BNE, reference_BNE, weight_BE, beta=0.1)
    return numerator / examples

  alone = dpo_loss(policy_BNE[..., :1], reference_BNE[..., :1], weight_BE[:, :1], beta=0.1)[0]
  np.testing.assert_allclose(loss(policy_BNE), alone[0] / alone[1])


def test_chunks_do_not_change_log_probs_or_gradients():
  keys = jax.random.split(jax.random.key(0), 3)
  hidden = jax.random.normal(keys[0], (2, 10, 8))
  head = jax.random.normal(keys[1], (32, 8))
  targets = jax.random.randint(keys[2], (2, 10), 0, 32)

  def by_hand(hidden, head):
    return jnp.take_along_axis(jax.nn.log_softmax(hidden @ head.T), targets[..., None], -1)[..., 0]

  for chunk in (1, 4, 10, 64):
    ours = token_log_probs(hidden, head, targets, chunk=chunk)
    np.testing.assert_allclose(ours, by_hand(hidden, head), rtol=1e-5, atol=1e-5)
    gradients = [
      jax.grad(lambda h, w, f=f: (f(h, w) ** 2).sum(), argnums=(0, 1))(hidden, head)
      for f in (by_hand, lambda h, w, c=chunk: token_log_probs(h, w, targets, chunk=c))
    ]
    for expected, got in zip(*gradients, strict=True):
      np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-4)
