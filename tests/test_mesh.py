"""Meshes: one step is the same on each; what does not divide is refused; rules cover all."""

import jax
import numpy as np
import pytest
from flax import nnx

from alignx_jax.models.decoder import Decoder
from alignx_jax.models.presets import PRESETS, get_architecture
from alignx_jax.training import mesh as meshes
from tests.processes import run_together

# replica, fsdp, tensor, context
SIZES = {
  "ica": [(1, 1, 1, 1), (1, 8, 1, 1), (2, 2, 2, 1), (1, 2, 2, 2)],
  "pba": [(1, 1, 1, 1), (2, 2, 1, 2)],  # two passes take twice as long to compile
}

# The same, of two processes.
TOGETHER = {"ica": [(1, 4, 1, 1)], "pba": [(1, 2, 2, 1)]}


@pytest.fixture(scope="module", params=["ica", pytest.param("pba", marks=pytest.mark.slow)])
def steps(request, tmp_path_factory):
  """An objective, and one step of it on each of its SIZES, in a process of eight devices."""
  path = tmp_path_factory.mktemp("steps") / "steps.npz"
  numbers = [n for sizes in SIZES[request.param] for n in sizes]
  arguments = ["-m", "tests.one_step", path, request.param, *numbers]
  run_together(arguments, processes=1, devices=8, timeout=600)
  return request.param, dict(np.load(path))


def of_mesh(arrays, i):
  return {k.removeprefix(f"{i}/"): v for k, v in arrays.items() if k.startswith(f"{i}/")}


def assert_close(found, expected):
  assert found.keys() == expected.keys() and len(found) > 20
  for name, value in expected.items():
    scale = max(1e-3, np.abs(value).max())
    # Adam divides by the gradient's size: what is near zero may go either way.
    tolerance = 1e-5 if "after" not in name else 2e-2
    np.testing.assert_allclose(found[name], value, atol=tolerance * scale, err_msg=name)


@pytest.mark.slow
def test_one_step_is_the_same_on_every_mesh(steps):
  objective, arrays = steps
  for i in range(1, len(SIZES[objective])):
    assert_close(of_mesh(arrays, i), of_mesh(arrays, 0))


@pytest.mark.slow
def test_two_processes_of_two_devices_make_the_same_step(steps, tmp_path):
  objective, arrays = steps
  for i, sizes in enumerate(TOGETHER[objective]):
    path = tmp_path / f"{i}.npz"
    run_together(["-m", "tests.one_step", path, objective, *sizes], processes=2, devices=2)
    assert_close(of_mesh(dict(np.load(path)), 0), of_mesh(arrays, 0))


@pytest.mark.parametrize("name", PRESETS)
def test_every_parameter_of_every_preset_has_a_rule(name):
  model = nnx.eval_shape(lambda: Decoder(get_architecture(name), rngs=nnx.Rngs(0)))
  shardings = meshes.param_shardings(nnx.state(model), meshes.make_mesh(None, jax.devices()[:1]))
  whole = [
    jax.tree_util.keystr(path)
    for path, sharding in jax.tree_util.tree_leaves_with_path(shardings)
    if not any(sharding.spec)
  ]
  assert len(whole) == 3 and all("norm_D" in path for path in whole)


def test_a_parameter_without_a_rule_and_one_that_does_not_divide_are_refused():
  mesh = meshes.make_mesh(None, jax.devices()[:2])
  shape = lambda *size: jax.ShapeDtypeStruct(size, np.float32)
  with pytest.raises(ValueError, match="No sharding rule matches parameter 'blocks/new_DD'"):
    meshes.param_shardings({"blocks": {"new_DD": shape(1, 4, 4)}}, mesh)
  with pytest.raises(ValueError, match=r"'embedding_VD' of shape \(10, 3\): 3 does not divide"):
    meshes.param_shardings({"embedding_VD": shape(10, 3)}, mesh)


@pytest.mark.parametrize(
  ("sizes", "message"),
  [
    ({"replica": 1, "fsdp": 3, "tensor": 1, "context": 1}, "does not make up the 2 devices"),
    ({"replica": 1, "fsdp": 0, "tensor": 4, "context": 1}, "does not make up the 2 devices"),
    ({"replica": 0, "fsdp": 0, "tensor": 1, "context": 1}, "one at most 0"),
  ],
)
def test_sizes_that_do_not_make_up_the_devices_are_refused(sizes, message):
  with pytest.raises(ValueError, match=message):
    meshes.make_mesh(sizes, jax.devices()[:2])
