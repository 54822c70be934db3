"""The TPU kernels equal packed_attention, on one device and on a mesh, and compile for TPUs."""

import functools
import math
import os
import re
import tracemalloc

# Before libtpu loads: look for no TPU, and let another process compile beside this one.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from alignx_jax.data.rows import Regions
from alignx_jax.models.attention import packed_attention, rotary_tables, rotate
from alignx_jax.models.presets import get_architecture
from alignx_jax.models.splash import PackedMask, _deal, splash_attention
from tests.packing import pack

pytestmark = pytest.mark.usefixtures("optimised")

# Of two context shards with blocks of 128, each has queries to swap: 300 / 2 > 128.
REGIONS = Regions(context=210, response=45, examples=4)
H, K, A = 4, 2, 8


@pytest.fixture(scope="module")
def rows():
  """Two rows of several examples each, with padding in every region."""
  rng = np.random.default_rng(0)
  sizes = (90, 11, 17), (60, 20, 9), (40, 1, 9), (130, 32, 20), (60, 9, 18)
  examples = [tuple(rng.integers(0, 256, n).tolist() for n in parts) for parts in sizes]
  return pack(examples, REGIONS, rows=2)


@pytest.fixture(scope="module")
def inputs():
  """Queries, keys and values before rotation, and the gradient of their mix."""
  rng = np.random.default_rng(1)
  shapes = ((2, REGIONS.layout, heads, A) for heads in (H, K, K, H))
  return tuple(rng.normal(size=shape).astype(np.float32) for shape in shapes)


@pytest.fixture(scope="module")
def expected(rows, inputs):
  return _mixed_and_gradients(packed_attention, rows, inputs)


@functools.partial(jax.jit, static_argnames=("attend", "response"))
def _mixed_and_gradients(attend, rows, inputs, response=REGIONS.response):
  """Mixed values and the gradients of q, k, v."""
  *qkv, mixed_gradient = inputs
  tables = rotary_tables(rows.positions_BL, get_architecture("tiny"))

  def rotated(q, k, v):
    q, k = rotate(q, tables), rotate(k, tables)
    return attend(q, k, v, rows.segments_BL, response=response)

  mixed, pull_back = jax.vjp(rotated, *qkv)
  return mixed, *pull_back(mixed_gradient)


def _splash(*args, block_q=128, block_kv=128, **kwargs):
  return splash_attention(*args, **kwargs, block_q=block_q, block_kv=block_kv, interpret=True)


def _mesh(**axes):
  return jax.make_mesh(tuple(axes.values()), tuple(axes), axis_types=(AxisType.Auto,) * len(axes))


def _assert_close(ours, expected, tolerance=2e-5):
  for our, their in zip(ours, expected, strict=True):
    np.testing.assert_allclose(our, their, rtol=tolerance, atol=tolerance)


def test_equals_packed_attention(rows, inputs, expected):
  _assert_close(_mixed_and_gradients(_splash, rows, inputs), expected)


@pytest.mark.parametrize(("block_q", "block_kv"), [(256, 128), (128, 512)])
def test_equals_packed_attention_in_other_blocks(rows, inputs, expected, block_q, block_kv):
  attend = functools.partial(_splash, block_q=block_q, block_kv=block_kv)
  _assert_close(_mixed_and_gradients(attend, rows, inputs), expected)


def test_equals_packed_attention_on_a_causal_sequence(rows, inputs):
  expected = _mixed_and_gradients(packed_attention, rows, inputs, response=0)
  _assert_close(_mixed_and_gradients(_splash, rows, inputs, response=0), expected)


def test_bfloat16_comes_back_in_bfloat16(rows, inputs, expected):
  ours = _mixed_and_gradients(_splash, rows, tuple(x.astype(jnp.bfloat16) for x in inputs))
  assert {x.dtype for x in ours} == {jnp.dtype(jnp.bfloat16)}
  _assert_close([x.astype(np.float32) for x in ours], expected, tolerance=0.1)


@pytest.mark.parametrize(
  "axes",
  [
    {"tensor": 2},
    {"context": 2},
    {"fsdp": 2},
    {"replica": 1, "fsdp": 1, "tensor": 1, "context": 2},
  ],
  ids=lambda axes: "-".join(f"{axis}{size}" for axis, size in axes.items()),
)
def test_a_mesh_changes_nothing(rows, inputs, expected, axes):
  with jax.set_mesh(_mesh(**axes)):
    _assert_close(_mixed_and_gradients(_splash, rows, inputs), expected)


def test_rejected_is_blind_to_chosen(rows, inputs):
  C, R = REGIONS.context, REGIONS.response
  before = _mixed_and_gradients(_splash, rows, inputs)[0]
  changed = tuple(x.copy() for x in inputs)
  for x in changed:
    x[:, C : C + R] += 1
  after = _mixed_and_gradients(_splash, rows, changed)[0]
  same = np.all(np.asarray(before) == np.asarray(after), axis=(2, 3))
  assert same[:, C + R :].all() and same[:, :C].all() and not same[:, C : C + R].any()


def test_a_row_of_padding_is_finite(rows, inputs):
  empty = rows._replace(segments_BL=rows.segments_BL * np.array([[1], [0]], np.int32))
  for x in _mixed_and_gradients(_splash, empty, inputs):
    assert np.isfinite(x).all()


@pytest.mark.parametrize(
  ("axes", "message"),
  [
    ({"tensor": 2}, "3 heads do not divide by the 2 devices of mesh axis tensor"),
    ({"context": 2}, "231 positions of a row do not divide by the 2 devices of mesh axis context"),
    (
      {"replica": 1, "fsdp": 2},
      "1 rows do not divide by the 2 devices of mesh axis replica × fsdp",
    ),
  ],
)
def test_what_does_not_divide_is_refused(axes, message):
  q = jnp.zeros((1, 231, 3, A))
  with jax.set_mesh(_mesh(**axes)), pytest.raises(ValueError, match=message):
    _splash(q, q, q, jnp.ones((1, 231), jnp.int32), response=40)


def test_kv_heads_that_do_not_divide_and_odd_blocks_are_refused():
  q, k = jnp.zeros((1, 128, 2, A)), jnp.zeros((1, 128, 1, A))
  segments = jnp.ones((1, 128), jnp.int32)
  with jax.set_mesh(_mesh(tensor=2)), pytest.raises(ValueError, match="1 kv heads do not divide"):
    _splash(q, k, k, segments, response=0)
  with pytest.raises(ValueError, match="block_kv is 100; it must be a positive multiple of 128"):
    _splash(q, k, k, segments, response=0, block_kv=100)


@pytest.mark.parametrize("shards", [2, 4, 5])
def test_context_shards_are_dealt_what_the_mask_says_and_get_their_own_back(shards):
  queries, padded = 64, 80
  keys = queries * shards
  mask = PackedMask(keys, keys, queries=queries, padded=padded, keys=keys, shards=shards)

  def deal(x_SL, **kwargs):
    one = lambda x_L: _deal(x_L[None], shards, **kwargs)[0]
    return jax.vmap(one, axis_name="context")(x_SL)

  # Where each shard's own rows are in the layout, and where the mask takes its rows to be.
  places_SL = np.arange(shards)[:, None] * queries + np.arange(padded)
  dealt_SL = deal(places_SL)
  np.testing.assert_array_equal(dealt_SL, mask.q_sequence.reshape(shards, padded))
  np.testing.assert_array_equal(deal(dealt_SL, back=True), places_SL)


def test_no_context_shard_works_much_more_than_the_mean():
  C, R, shards, block = 6144, 1024, 4, 256
  L = C + 2 * R
  mask = PackedMask(C, C + R, queries=L // shards, padded=L // shards, keys=L, shards=shards)
  seen = [mask[start : start + block, :].sum() for start in range(0, L, block)]
  work = np.reshape(seen, (shards, -1)).sum(axis=1)
  assert work.max() < 1.05 * work.mean()


def test_a_long_row_needs_no_dense_mask():
  L, R = 32768, 4096
  shapes = [jax.ShapeDtypeStruct((1, L, heads, 128), jnp.bfloat16) for heads in (32, 8, 8)]
  attend = functools.partial(splash_attention, response=R, block_q=1024, block_kv=1024)
  tracemalloc.start()
  mixed = jax.eval_shape(attend, *shapes, jax.ShapeDtypeStruct((1, L), jnp.int32))
  _, peak = tracemalloc.get_traced_memory()
  tracemalloc.stop()
  assert mixed.shape == (1, L, 32, 128)
  assert peak < L * L / 16


@pytest.mark.parametrize("axes", [{"fsdp": 2, "tensor": 2}, {"context": 4}], ids=str)
def test_compiles_for_a_tpu_without_scores_in_memory(axes):
  pytest.importorskip("libtpu")
  topology = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2")
  devices = np.array(topology.devices).reshape(tuple(axes.values()))
  mesh = Mesh(devices, tuple(axes), axis_types=(AxisType.Auto,) * len(axes))
  B, C, R, heads = 4, 1024, 256, (8, 4, 4)
  L = C + 2 * R
  spec = P(*(axis if axis in axes else None for axis in ("fsdp", "context", "tensor")))

  def array(shape, dtype, spec):
    return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))

  def loss(q, k, v, segments):
    return splash_attention(q, k, v, segments, response=R).astype(jnp.float32).sum()

  with jax.set_mesh(mesh):
    compiled = (
      jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2)))
      .lower(
        *(array((B, L, n, 128), jnp.bfloat16, spec) for n in heads),
        array((B, L), jnp.int32, P(*spec[:2])),
      )
      .compile()
    )
  text = compiled.as_text()
  # Forward, dq, and dk with dv.
  assert text.count('custom_call_target="tpu_custom_call"') == 3
  sizes = [
    math.prod(map(int, shape.split(","))) for shape in re.findall(r"\w+\[(\d+(?:,\d+)*)\]", text)
  ]
  assert not re.search(rf"[\[,]{L},{L}\]", text)
  scores = B * heads[0] * L * L // mesh.size
  assert max(sizes) < scores / 4
