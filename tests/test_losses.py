"""Preference losses against hand-worked values."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from alignx_jax.data.rows import Regions
from alignx_jax.experiments import experiment as experiments
from alignx_jax.models.decoder import Decoder
from alignx_jax.models.presets import get_architecture
from alignx_jax.objectives.log_probs import response_lengths, token_log_probs
from alignx_jax.objectives.losses import LOSSES, PreferenceLoss
from alignx_jax.training import mesh as meshes
from alignx_jax.training.metrics import read_metrics
from alignx_jax.training.steps import mean_gradient
from tests.packing import pack
from tests.small_records import small_config, write_small_records

# Log-ratios 2 and −1, their difference 3; lengths 3 and 4.
POLICY_BNE = jnp.array([[[-3.0], [-6.0]]])
REFERENCE_BNE = jnp.array([[[-5.0], [-5.0]]])
LENGTHS_BNE = jnp.array([[[3], [4]]])
# Loss, and its value, chosen and rejected reward of that by hand.
BY_HAND = (
  # m = 0.5 · 3 = 1.5; log(1 + e^−1.5).
  (PreferenceLoss("sigmoid", 0.5), 0.2014133, 1.0, -0.5),
  # 0.9 log(1 + e^−1.5) + 0.1 log(1 + e^1.5) = log(1 + e^−1.5) + 0.1 · 1.5.
  (PreferenceLoss("sigmoid", 0.5, label_smoothing=0.1), 0.3514133, 1.0, -0.5),
  # (3 − 1 / 0.5)².
  (PreferenceLoss("ipo", 0.25), 1.0, 0.5, -0.25),
  (PreferenceLoss("hinge", 0.25), 0.25, 0.5, -0.25),  # 1 − 0.75
  (PreferenceLoss("hinge", 0.5), 0.0, 1.0, -0.5),  # 1 − 1.5 is below 0
  # The first, and 0.6 nats of the chosen response's 3 in 3 tokens.
  (PreferenceLoss("sigmoid", 0.5, likelihood_weight=0.6), 0.8014133, 1.0, -0.5),
  # 2/3 · −3 = −2 and 2/4 · −6 = −3; log(1 + e^−(1 − 0.5)).
  (PreferenceLoss("simpo", 2.0, target_margin=0.5), 0.4740770, -2.0, -3.0),
)


@pytest.mark.parametrize("loss, value, chosen, rejected", BY_HAND)
def test_losses_by_hand(loss, value, chosen, rejected):
  given = POLICY_BNE, REFERENCE_BNE, LENGTHS_BNE, jnp.ones((1, 1))
  (numerator, examples), metrics = loss(*given)
  np.testing.assert_allclose(numerator / examples, value, rtol=1e-6, atol=1e-7)
  np.testing.assert_allclose(metrics["chosen_reward"][0], chosen, rtol=1e-6)
  np.testing.assert_allclose(metrics["rejected_reward"][0], rejected, rtol=1e-6)
  np.testing.assert_allclose(metrics["margin"][0], chosen - rejected, rtol=1e-6)
  assert metrics["reward_accuracy"][0] == 1


def test_every_loss_is_worked_by_hand():
  assert {loss.name for loss, *_ in BY_HAND} == set(LOSSES)


@pytest.mark.parametrize(
  "loss, value",
  [
    (PreferenceLoss("sigmoid", 0.1), np.log(2)),
    (PreferenceLoss("sigmoid", 0.1, label_smoothing=0.3), np.log(2)),
    (PreferenceLoss("ipo", 0.1), 25.0),  # 1 / (4 · 0.1²)
    (PreferenceLoss("hinge", 0.1), 1.0),
  ],
)
def test_a_policy_equal_to_its_reference(loss, value):
  scores = jnp.array([[[-3.0, -1.0], [-6.0, -1.0]]])
  (numerator, examples), metrics = loss(scores, scores, jnp.ones((1, 2, 2)), jnp.ones((1, 2)))
  np.testing.assert_allclose(numerator / examples, value, rtol=1e-6)
  assert metrics["reward_accuracy"][0] == 0  # strict: a tie is no success


@pytest.mark.parametrize("name", LOSSES)
def test_empty_slots_count_nothing(name):
  loss = PreferenceLoss(name, 0.1)
  empty = lambda x, value: jnp.concatenate([x, jnp.full_like(x, value)], axis=-1)

  def mean(policy_BNE, value):
    given = empty(policy_BNE, value), empty(REFERENCE_BNE, 0), empty(LENGTHS_BNE, 0)
    (numerator, examples), _ = loss(*given, jnp.array([[1.0, 0.0]]))
    return numerator / examples

  alone = lambda x: loss(x, REFERENCE_BNE, LENGTHS_BNE, jnp.ones((1, 1)))[0][0]
  for value in (0.0, jnp.nan):  # even when not finite
    np.testing.assert_allclose(mean(POLICY_BNE, value), alone(POLICY_BNE))
  gradient = jax.grad(mean)(POLICY_BNE, 0.0)
  np.testing.assert_allclose(gradient, jax.grad(alone)(POLICY_BNE), rtol=1e-6)


def test_lengths_are_those_of_the_packed_responses():
  examples = [([1, 2, 3], [4, 5, 6], [7, 8]), ([9, 1], [2], [3, 4, 5, 6])]
  rows = pack(examples, Regions(context=12, response=8, examples=3))
  np.testing.assert_array_equal(response_lengths(rows)[0], [[3, 1, 0], [2, 4, 0]])


@pytest.mark.slow
def test_gradients_are_the_same_split_over_devices_and_parts():
  loss = PreferenceLoss("simpo", 2.0)
  rng = np.random.default_rng(0)
  ids = lambda n: rng.integers(1, 256, n).tolist()
  regions = Regions(context=32, response=16, examples=2)
  rows = [pack([(ids(9), ids(5), ids(3 + i))], regions) for i in range(4)]
  rows = jax.tree.map(lambda *x: np.concatenate(x), *rows)
  graph, params = nnx.split(Decoder(get_architecture("tiny8"), rngs=nnx.Rngs(0)))

  def gradient(devices, accumulation, chunk):
    mesh = meshes.make_mesh(None, jax.devices()[:devices])
    options = {"graph": graph, "loss": loss, "chunk": chunk, "accumulation": accumulation}
    step = lambda *x: mean_gradient(*x, online=False, **options)
    placed = jax.device_put(rows, meshes.rows_sharding(mesh, 4))
    with jax.set_mesh(mesh):
      found, metrics = jax.jit(step)(params, nnx.State({}), placed)
    return jax.device_get(jax.tree.leaves(found)), jax.device_get(metrics["loss"])

  expected, pair = gradient(1, 1, 64)
  assert np.linalg.norm(expected[0]) > 0
  found, again = gradient(2, 2, 8)
  np.testing.assert_allclose(again, pair, rtol=1e-5)
  for x, y in zip(expected, found, strict=True):
    np.testing.assert_allclose(y, x, atol=1e-5 * (1 + np.abs(x).max()))


def _config(tmp_path, **objective):
  config = small_config(write_small_records(tmp_path / "records.json"))
  config.objective.update(objective)
  return config


def test_simpo_trains_without_a_reference(tmp_path):
  config = _config(tmp_path, loss="simpo", beta=2.0, target_margin=0.5)
  config.train.steps = 3
  experiments.run_training(experiments.load_experiment(config), tmp_path / "run")
  losses = [line["loss"] for line in read_metrics(tmp_path / "run")]
  assert len(losses) == 3 and np.isfinite(losses).all()
  assert not list(tmp_path.rglob("reference_*"))  # nothing was scored


@pytest.mark.parametrize(
  "objective, said",
  [
    ({"loss": "orpo"}, "'orpo'; set it to sigmoid or ipo or hinge or simpo"),
    ({"beta": 0.0}, r"objective\.beta is 0\.0; set it above 0"),
    ({"label_smoothing": 0.5}, "below 0.5, where labels say nothing"),
    ({"loss": "ipo", "label_smoothing": 0.1}, "config.objective.loss to 'sigmoid'"),
    ({"target_margin": 0.5}, "config.objective.loss to 'simpo'"),
    ({"loss": "simpo", "target_margin": -0.5}, "set it to 0 or more"),
    ({"likelihood_weight": -0.5}, "likelihood_weight is -0.5; set it to 0 or more"),
  ],
)
def test_a_loss_that_there_is_not_is_refused(tmp_path, objective, said):
  with pytest.raises(ValueError, match=said):
    experiments.load_experiment(_config(tmp_path, **objective))


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
