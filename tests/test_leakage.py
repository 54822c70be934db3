"""What P̃ gives away, on simulated users of whom it is known; the fit against references."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from alignx_jax.evaluation.leakage import fit_logistic, leakage_row, macro_auc, out_of_fold
from alignx_jax.personas.demographics import NOT_STATED, stated
from alignx_jax.personas.simulator import SimulatorConfig, simulate_user


def test_an_unpenalised_fit_to_one_yes_or_no_is_the_log_odds_ratio():
  # 30 of 40 against 10 of 50.
  feature = np.repeat([1.0, 0.0], [40, 50])
  label = np.concatenate([np.repeat([1, 0], [30, 10]), np.repeat([1, 0], [10, 40])])
  weights_GF, bias_G = fit_logistic(feature[:, None], label, penalty=0.0)
  np.testing.assert_allclose(weights_GF[1] - weights_GF[0], np.log(3) - np.log(0.25), rtol=1e-4)
  np.testing.assert_allclose(bias_G[1] - bias_G[0], np.log(0.25), rtol=1e-4)


def test_a_penalised_fit_is_where_newtons_method_arrives():
  rng = np.random.default_rng(0)
  features_XF = rng.normal(size=(80, 3))
  label_X = rng.integers(3, size=80)
  with jax.enable_x64(True):

    def loss(flat):  # written anew, by JAX's derivatives
      weights_GF, bias_G = flat[:9].reshape(3, 3), flat[9:]
      log_p = jax.nn.log_softmax(jnp.asarray(features_XF) @ weights_GF.T + bias_G)
      # Nothing of the data decides on what is added to all biases.
      rest = jnp.sum(weights_GF**2) + 1e-3 * jnp.sum(bias_G) ** 2
      return -jnp.sum(log_p[jnp.arange(80), label_X]) + rest

    newton = lambda x: x - jnp.linalg.solve(jax.hessian(loss)(x), jax.grad(loss)(x))
    step = jax.jit(newton)
    flat = jnp.zeros(12)
    for _ in range(20):
      flat = step(flat)
    flat = np.asarray(flat)
  weights_GF, bias_G = fit_logistic(features_XF, label_X, penalty=2.0)
  np.testing.assert_allclose(weights_GF, flat[:9].reshape(3, 3), atol=1e-4)
  np.testing.assert_allclose(bias_G, flat[9:] - flat[9:].mean(), atol=1e-4)


def test_the_area_is_the_share_of_pairs_in_order():
  rng = np.random.default_rng(1)
  score_X, label_X = rng.integers(6, size=60) / 5, rng.integers(2, size=60)
  yes, no = score_X[label_X == 1], score_X[label_X == 0]
  by_hand = np.mean((yes[:, None] > no) + 0.5 * (yes[:, None] == no))
  score_XG = np.stack([1 - score_X, score_X], 1)
  assert macro_auc(score_XG, label_X) == pytest.approx(by_hand)
  assert np.isnan(macro_auc(score_XG, np.zeros(60, int)))


def test_nobody_is_predicted_by_a_fit_to_themselves():
  # Two records of each user say who they are, and a user's label is a coin: chance is all.
  rng = np.random.default_rng(2)
  user_X, label_U = np.repeat(np.arange(60), 2), rng.integers(2, size=60)
  predicted_XG, _ = out_of_fold(np.eye(60)[user_X], label_U[user_X], user_X)
  assert np.ptp(predicted_XG[:, 1]) < 0.2  # it has seen nothing of them


def _users(link, count=500):
  """P̃ that says all of the directions of users, and what they state."""
  config = SimulatorConfig(demographics=link)
  users = [simulate_user(i, split="test", seed=5, config=config) for i in range(count)]
  direction_XP = np.stack([user.directions for user in users])
  p_XPK = (direction_XP[..., None] == np.array([0, 0.5, 1])).astype(float)
  told = [user.introduction for user in users]
  return p_XPK, {name: [stated(text, name) for text in told] for name in ("gender", "age")}


@pytest.mark.parametrize("attribute", ["gender", "age"])
def test_leakage_that_is_there_is_found_and_none_is_covered(attribute):
  ids = [str(i) for i in range(500)]
  p_XPK, groups = _users(0.5)
  row = leakage_row(p_XPK, groups[attribute], ids, samples=200)
  assert row["examples"] == 500 and sum(row["groups"].values()) == 500
  assert 0.6 < row["auc_low"] < row["auc"] < row["auc_high"]
  assert row["gain_low"] > 0
  assert row["gain"] == pytest.approx(row["accuracy"] - row["majority"])
  p_XPK, groups = _users(0.0)
  row = leakage_row(p_XPK, groups[attribute], ids, samples=200)
  assert row["auc_low"] <= 0.5 <= row["auc_high"]
  assert row["gain_low"] <= 0


def test_too_few_users_say_nothing():
  p_XPK, groups = _users(0.5, 60)
  few = ["female"] * 29 + ["male"] * 31
  row = leakage_row(p_XPK, few, [str(i) for i in range(60)])
  assert not row["enough"] and row["auc"] is None and row["groups"] == {"male": 31}
  same = leakage_row(p_XPK, ["female", "male"] * 30, ["one", "other"] * 30)
  assert not same["enough"]  # many records, two users
  assert not leakage_row(p_XPK, [NOT_STATED] * 60, ["x"] * 60)["enough"]
