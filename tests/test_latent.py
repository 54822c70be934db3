"""The latent user variable: what it is inferred from, who sees it, when it collapses."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.integrate
import scipy.stats
from flax import nnx

from alignx_jax.data.rows import Regions, Tokenised, TokenisedPart, lay_out, stack
from alignx_jax.evaluation.latents import latent_results, summarise
from alignx_jax.models.decoder import Decoder
from alignx_jax.models.latent import CHOSEN, REJECTED, Posterior, add_latent, encode, moves
from alignx_jax.models.presets import get_architecture
from alignx_jax.objectives.log_probs import response_log_probs
from alignx_jax.objectives.vpl import LatentObjective, divergence, latent_log_probs, sample
from alignx_jax.personas.prompts import PART_KINDS

Z, T = 5, 3
REGIONS = Regions(context=40, response=24, examples=3, persona=128, parts=12)


@pytest.fixture(scope="module")
def start():
  """A model as training starts."""
  made = Decoder(get_architecture("tiny"), rngs=nnx.Rngs(0), remat=False)
  add_latent(made, size=Z, tokens=T, width=16, rngs=nnx.Rngs(1))
  return made


@pytest.fixture(scope="module")
def model(start):
  """One that has learned something: of no parameter is the value special."""
  graph, params = nnx.split(start)
  rng = np.random.default_rng(0)
  learnt = lambda x: x + jnp.asarray(rng.normal(size=x.shape, scale=0.3), jnp.float32)
  params = nnx.State({**params, "latent": jax.tree.map(learnt, params["latent"])})
  return nnx.merge(graph, params)


@pytest.fixture(scope="module")
def posterior(model):
  return jax.jit(lambda rows: encode(model, rows))


@pytest.fixture(scope="module")
def log_probs(model):
  """By rows, of the mean of z."""
  mean = lambda rows: encode(model, rows).mean_BEZ
  return jax.jit(lambda rows: response_log_probs(model, rows, latent_BEZ=mean(rows), chunk=7))


@pytest.fixture(scope="module")
def given(model):
  """Log-probs by rows, of any z."""
  return jax.jit(lambda rows, z: response_log_probs(model, rows, latent_BEZ=z, chunk=7))


def example(seed, pairs=2):
  rng = np.random.default_rng(seed)
  ids = lambda size: rng.integers(1, 259, size=size).tolist()
  kinds = (CHOSEN, REJECTED) * pairs
  persona = tuple(TokenisedPart(ids(int(rng.integers(4, 10))), kind) for kind in kinds)
  return Tokenised(ids(10), ids(6), ids(5), persona=persona)


def pack(*rows):
  return stack([lay_out(examples, REGIONS, indices=range(len(examples))) for examples in rows])


# ------------------------------------------------------------------ the numbers


@pytest.mark.parametrize(
  ("mean", "variance", "expected"),
  [(0.0, 1.0, 0.0), (1.0, 1.0, 0.5), (0.0, np.e, np.e / 2 - 1), (2.0, 0.25, 1.625 + np.log(2))],
)
def test_divergence_by_hand_and_by_integration(mean, variance, expected):
  found = divergence(jnp.float32(mean), jnp.log(jnp.float32(variance)))
  np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-7)
  q, p = scipy.stats.norm(mean, variance**0.5), scipy.stats.norm()
  integral, _ = scipy.integrate.quad(
    lambda x: q.pdf(x) * (q.logpdf(x) - p.logpdf(x)), mean - 12, mean + 12
  )
  np.testing.assert_allclose(found, integral, rtol=1e-5, atol=1e-6)


def test_active_units_by_hand():
  # Over users 1, 2, 4 the means vary by 0, 0.0054 and 0.06; user 3 could not be read.
  mean_XZ = np.array([[3.0, 0.0, 0.5], [3.0, 0.18, 0.5], [np.nan] * 3, [3.0, 0.09, -0.02]])
  rows = latent_results(np.stack([mean_XZ, 0 * mean_XZ], axis=1))
  np.testing.assert_allclose([row["variance"] for row in rows], [0, 0.0054, 0.0600889], atol=1e-6)
  assert [row["active"] for row in rows] == [False, False, True]
  np.testing.assert_allclose(rows[0]["kl"], 4.5)  # 3² / 2: far from the prior, alike for all
  assert {row["users"] for row in rows} == {3}
  assert "1 of 3 dimensions are active" in summarise(rows)
  assert "collapsed" in summarise(rows[:2]) and "collapsed" not in summarise(rows)


def test_draws_have_the_posteriors_moments_and_go_with_the_example():
  mean, variance = jnp.float32(0.7), jnp.float32(0.3)
  whole = Posterior(jnp.full((40, 50, Z), mean), jnp.full((40, 50, Z), jnp.log(variance)))
  slots = jnp.arange(2000).reshape(40, 50)
  drawn = sample(whole, 0, 3, slots)
  np.testing.assert_allclose(drawn.mean(), mean, atol=0.02)
  np.testing.assert_allclose(drawn.var(), variance, atol=0.02)
  np.testing.assert_array_equal(sample(whole, 0, 3, slots[::-1]), drawn[::-1])
  assert (sample(whole, 0, 4, slots) != drawn).all() and (sample(whole, 1, 3, slots) != drawn).all()


def test_the_weight_of_the_divergence_rises_to_its_value():
  rising, at_once = LatentObjective(0.2, 10.0, 0), LatentObjective(0.2, 0.0, 0)
  np.testing.assert_allclose([rising.weight_at(i) for i in (0, 5, 10, 20)], [0, 0.1, 0.2, 0.2])
  assert at_once.weight_at(0) == 0.2


# ------------------------------------------------------------------ what it is inferred from


def test_of_no_pairs_the_posterior_is_the_prior(posterior):
  comments = tuple(TokenisedPart([5, 6, 7], PART_KINDS.index("written")) for _ in range(3))
  found = posterior(pack([example(1, pairs=0), example(2)._replace(persona=comments), example(3)]))
  for values_BEZ in found:
    assert not np.any(values_BEZ[0, :2]) and np.all(values_BEZ[0, 2])


def test_pairs_are_a_set_and_their_responses_are_not(posterior):
  user = example(4, pairs=3)
  parts = user.persona
  turned = user._replace(persona=parts[4:] + parts[2:4] + parts[:2])
  mine = posterior(pack([user])).mean_BEZ[0, 0]
  np.testing.assert_allclose(posterior(pack([turned])).mean_BEZ[0, 0], mine, atol=1e-5)
  swapped = [part._replace(ids=parts[i ^ 1].ids) for i, part in enumerate(parts)]
  other = posterior(pack([user._replace(persona=tuple(swapped))])).mean_BEZ[0, 0]
  assert np.abs(other - mine).max() > 1e-2


# ------------------------------------------------------------------ who sees it


def test_users_of_a_row_do_not_see_each_others_pairs(posterior, log_probs):
  users = [example(i) for i in range(3)]
  changed = [users[0]._replace(persona=example(9, pairs=1).persona), *users[1:]]
  for value in (lambda rows: posterior(rows).mean_BEZ[0], lambda rows: log_probs(rows)[0].T):
    before, after = value(pack(users)), value(pack(changed))
    np.testing.assert_allclose(after[1:], before[1:], atol=1e-5)
    assert np.abs(after[0] - before[0]).max() > 1e-2


def test_packed_equals_each_user_alone(posterior, log_probs):
  users = [example(0), example(1, pairs=0), example(2, pairs=1)]
  packed = pack(users)
  whole, scores = posterior(packed), log_probs(packed)
  for i, user in enumerate(users):
    alone = pack([user])
    for one, all_ in zip(posterior(alone), whole, strict=True):
      np.testing.assert_allclose(one[0, 0], all_[0, i], atol=1e-5)
    np.testing.assert_allclose(log_probs(alone)[0, :, 0], scores[0, :, i], atol=1e-4)


def test_the_policy_sees_the_pairs_through_z_alone(given):
  z = np.random.default_rng(0).normal(size=(1, 3, Z)).astype(np.float32)
  user = example(1)
  other = user._replace(persona=example(2).persona)
  np.testing.assert_array_equal(given(pack([user]), z), given(pack([other]), z))
  assert np.abs(given(pack([user]), -z) - given(pack([user]), z))[0, :, 0].min() > 1e-3


def test_z_moves_the_soft_tokens_of_its_own_prompt_and_of_nothing_else(model):
  rows = pack([example(1), example(2)._replace(context=[7, 8, 9])])
  z = np.random.default_rng(0).normal(size=(1, 3, Z)).astype(np.float32)
  moved = np.asarray(moves(model, rows, z))[0]
  table = np.asarray(model.latent.token_ZTD[...])
  expected = np.zeros_like(moved)
  # Contexts of 9 and of 2 tokens in their region; the first of each stays.
  expected[1 : 1 + T] = np.einsum("z,ztd->td", z[0, 0], table)
  expected[10] = z[0, 1] @ table[:, 0]
  np.testing.assert_allclose(moved, expected, atol=1e-5)


def test_without_z_and_before_training_the_policy_is_the_reference(start, model, given):
  rows = pack([example(1), example(2, pairs=0)])
  plain = jax.jit(lambda rows: response_log_probs(model, rows, chunk=7))(rows)
  np.testing.assert_array_equal(given(rows, np.zeros((1, 3, Z), np.float32)), plain)
  objective = LatentObjective(0.5, 0.0, 0)
  trained = lambda rows: latent_log_probs(start, rows, objective, 0, chunk=7)
  both = jax.jit(lambda rows: (trained(rows), encode(start, rows)))
  (log_probs, kl_BE, metrics), found = both(rows)
  np.testing.assert_array_equal(log_probs, plain)
  by_hand = 0.5 * divergence(*found).sum(axis=-1)
  np.testing.assert_allclose(kl_BE, by_hand * rows.weight_BE, rtol=1e-4)
  total, users = metrics["kl"]
  assert users == 2
  np.testing.assert_allclose(total, kl_BE.sum() / 0.5, rtol=1e-5)
  each = [metrics[f"kl_{z:02}"][0] for z in range(Z)]
  np.testing.assert_allclose(sum(each), total, rtol=1e-5)


# ------------------------------------------------------------------ collapse


@pytest.mark.slow
def test_a_huge_weight_of_the_divergence_makes_z_collapse_and_none_does_not(model):
  graph, params = nnx.split(model)
  rows = pack(*([example(3 * i + j) for j in range(3)] for i in range(4)))

  @jax.jit
  def train(params, weight, step):
    def loss(latent):
      whole = nnx.merge(graph, nnx.State({**params, "latent": latent}))
      objective = LatentObjective(weight, 0.0, 0)
      log_probs_BNE, kl_BE, _ = latent_log_probs(whole, rows, objective, step, chunk=24)
      return jnp.sum(kl_BE - jax.nn.log_sigmoid(log_probs_BNE[:, 0] - log_probs_BNE[:, 1]))

    gradient = jax.grad(loss)(params["latent"])
    norm = jnp.sqrt(sum(jnp.sum(x**2) for x in jax.tree.leaves(gradient)))
    moved = jax.tree.map(lambda x, g: x - 0.1 * 0.97**step * g / norm, params["latent"], gradient)
    return nnx.State({**params, "latent": moved})

  @jax.jit
  def inferred(params):
    return jnp.stack(encode(nnx.merge(graph, params), rows), axis=2).reshape(-1, 2, Z)

  active = {}
  for weight in (0.0, 1e3):
    trained = params
    for step in range(80):
      trained = train(trained, jnp.float32(weight), jnp.int32(step))
    active[weight] = sum(row["active"] for row in latent_results(np.asarray(inferred(trained))))
  assert active[0.0] >= 3 and active[1e3] == 0
