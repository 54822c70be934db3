"""Updates of parameters that are stored in bfloat16, and what a state holds."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from alignx_jax.data.rows import Regions
from alignx_jax.models.decoder import Decoder
from alignx_jax.models.presets import get_architecture
from alignx_jax.training import mesh as meshes
from alignx_jax.training.optimizer import make_optimizer
from alignx_jax.training.steps import add_updates, as_float32, make_steps
from configs import base


def test_small_updates_of_bfloat16_are_kept_on_average():
  # The next bfloat16 above 1 is 1 + 2^-7: rounding to the nearest would lose all of this.
  update = 2.0**-7 / 20
  params = {"x": jnp.ones((200, 500), jnp.bfloat16), "y": -jnp.ones((200, 500), jnp.bfloat16)}
  updates = jax.tree.map(lambda x: jnp.full(x.shape, update, jnp.float32), params)
  new = add_updates(params, updates, jnp.int32(3))
  for name in params:
    change = np.asarray(as_float32(new)[name] - as_float32(params)[name])
    assert new[name].dtype == jnp.bfloat16
    np.testing.assert_allclose(change.mean(), update, rtol=0.05)  # of 1e5 draws: 7 deviations
    assert len(np.unique(change)) == 2
  again, later = (add_updates(params, updates, jnp.int32(step)) for step in (3, 4))
  assert jnp.all(again["x"] == new["x"]) and jnp.any(later["x"] != new["x"])
  assert jnp.any((new["x"] > 1) != (new["y"] > -1))  # each parameter draws for itself


def test_what_bfloat16_holds_exactly_is_not_rounded():
  values = jnp.asarray([0.0, -0.0, 1.5, -3.0, 1e30, jnp.inf, -jnp.inf], jnp.bfloat16)
  zero = jnp.zeros(values.shape, jnp.float32)
  np.testing.assert_array_equal(add_updates([values], [zero], jnp.int32(0))[0], values)
  nan = add_updates([values], [zero * jnp.nan], jnp.int32(0))[0]
  assert jnp.all(jnp.isnan(nan))


def test_float32_parameters_are_added_to():
  x = jnp.asarray([1.0, 2.0])
  np.testing.assert_array_equal(add_updates([x], [x * 0.25], jnp.int32(0))[0], x * 1.25)


def test_moments_are_float32_whatever_the_parameters():
  config = base.get_config()
  config.train.rows = 2
  make = lambda: Decoder(get_architecture("tiny8"), rngs=nnx.Rngs(0), param_dtype=jnp.bfloat16)
  mesh = meshes.make_mesh(None, jax.devices()[:2])
  optimizer = make_optimizer(config.optimizer, 10)
  state = make_steps(config, nnx.eval_shape(make), mesh, Regions(64, 16, 2), optimizer).state
  assert {x.dtype for x in jax.tree.leaves(state.params)} == {jnp.dtype("bfloat16")}
  moments = [x for x in jax.tree.leaves(state.optimizer) if x.ndim]
  assert len(moments) == 2 * len(jax.tree.leaves(state.params))
  assert {x.dtype for x in moments} == {jnp.dtype("float32")}
  split = [x.sharding.spec for x in moments if any(x.sharding.spec)]
  assert len(split) == 2 * sum(any(x.sharding.spec) for x in jax.tree.leaves(state.params))
