"""Costs read from compiled TPU programs, against numbers worked out by hand."""

import os
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from alignx_jax.ahead import costs as costs_of
from alignx_jax.ahead import hlo
from alignx_jax.ahead.chips import parse_topology

pytestmark = pytest.mark.usefixtures("optimised")

os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")

T, D, F, LAYERS = 512, 256, 512, 6
LAYER_FLOPS = 2 * 2 * T * D * F  # two products of [T, D] or [T, F] with [D, F]


@pytest.fixture(scope="module")
def mesh():
  devices = parse_topology("v5e:2x2").devices
  return Mesh(np.array(devices), ("x",), axis_types=(AxisType.Auto,))


def compiled(mesh, function, *arguments, out=P(), donate=()):
  """Compiles for v5e:2x2; arguments are (shape, spec), bfloat16."""
  shapes = [
    jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=NamedSharding(mesh, spec))
    for shape, spec in arguments
  ]
  out = jax.tree.map(lambda spec: NamedSharding(mesh, spec), out)
  return jax.jit(function, out_shardings=out, donate_argnums=donate).lower(*shapes).compile()


def cost(program):
  return costs_of.program_costs(program.as_text())


def mlp(x_TD, weights):
  up_DF, down_DF = weights
  return x_TD + jnp.tanh(x_TD @ up_DF) @ down_DF.T


def stack(x_TD, up_XDF, down_XDF, *, remat=False):
  layer = lambda x, weights: (mlp(x, weights), None)
  return jax.lax.scan(jax.checkpoint(layer) if remat else layer, x_TD, (up_XDF, down_XDF))[0]


STACK = ((T, D), P()), ((LAYERS, D, F), P()), ((LAYERS, D, F), P())


@pytest.fixture(scope="module")
def scanned(mesh):
  return compiled(mesh, stack, *STACK)


def gradients(*, remat):
  loss = lambda *arguments: stack(*arguments, remat=remat).astype(jnp.float32).sum()
  return jax.grad(loss, argnums=(0, 1, 2))


# ------------------------------------------------------------------ FLOPs


def test_a_product_counts_two_for_each_multiplication(mesh):
  program = compiled(mesh, jnp.matmul, ((T, D), P()), ((D, F), P()))
  assert cost(program).flops == 2 * T * D * F == program.cost_analysis()["flops"]


@pytest.mark.parametrize("equation", ["bta,bsa->bts", "bts,bsa->bta", "btka,bska->bkts"])
def test_batched_products_count_no_holes(mesh, equation):
  sizes = {"b": 4, "t": 256, "s": 128, "a": 64, "k": 3}
  first, second, _ = re.split(",|->", equation)
  shapes = [(tuple(sizes[axis] for axis in axes), P()) for axes in (first, second)]
  program = compiled(mesh, lambda x, y: jnp.einsum(equation, x, y), *shapes)
  by_hand = 2 * np.prod([sizes[axis] for axis in {*first, *second}])
  assert cost(program).flops == by_hand
  assert program.cost_analysis()["flops"] == pytest.approx(by_hand, rel=0.02)


def test_a_loop_counts_as_often_as_it_runs(scanned):
  found = cost(scanned)
  assert found.flops == LAYERS * LAYER_FLOPS
  assert not found.unknown_loops
  # What makes this module necessary.
  assert scanned.cost_analysis()["flops"] < 1.1 * LAYER_FLOPS


def test_loops_in_loops_multiply(mesh):
  def twice(x, up, down):
    return jax.lax.scan(lambda x, _: (stack(x, up, down), None), x, length=3)[0]

  assert cost(compiled(mesh, twice, *STACK)).flops == 3 * LAYERS * LAYER_FLOPS


def test_cycles_of_a_loop_count_as_often_as_it_runs(mesh, scanned):
  one = compiled(mesh, lambda x, up, down: mlp(x, (up, down)), ((T, D), P()), *[((D, F), P())] * 2)
  assert cost(one).cycles > 0
  assert cost(scanned).cycles == pytest.approx(LAYERS * cost(one).cycles, rel=0.5)


def test_rematerialisation_adds_the_forward_pass_that_it_repeats(mesh):
  plain = cost(compiled(mesh, gradients(remat=False), *STACK, out=(P(),) * 3))
  remat = cost(compiled(mesh, gradients(remat=True), *STACK, out=(P(),) * 3))
  assert plain.flops == 3 * LAYERS * LAYER_FLOPS
  # Of a layer's two products the first alone is needed again.
  assert remat.flops - plain.flops == LAYERS * LAYER_FLOPS / 2


def test_of_a_branch_the_dearest_counts(mesh):
  def branch(x, y):
    return jax.lax.cond(x[0, 0] > 0, lambda: (x @ y) @ y.T, lambda: x)

  assert cost(compiled(mesh, branch, ((T, D), P()), ((D, F), P()))).flops == LAYER_FLOPS


def test_a_loop_that_data_ends_is_named_and_counted_once(mesh):
  def until(x, y):
    return jax.lax.while_loop(lambda x: x[0, 0] < 100, lambda x: x @ y, x)

  found = cost(compiled(mesh, until, ((T, D), P()), ((D, D), P())))
  assert found.flops == 2 * T * D * D
  assert len(found.unknown_loops) == 1


def test_the_compilers_note_of_a_loops_length_is_taken():
  x = jax.ShapeDtypeStruct((64, 64), jnp.float32)
  many = lambda x: jax.lax.fori_loop(0, 7, lambda _, y: jnp.sin(y @ x), x)
  text = jax.jit(many).lower(x).compile().as_text()
  assert "known_trip_count" in text
  assert costs_of.program_costs(text).flops == 7 * 2 * 64**3


# ------------------------------------------------------------------ exchanges


def test_a_product_split_over_what_it_sums_is_followed_by_an_all_reduce(mesh):
  found = cost(compiled(mesh, jnp.matmul, ((T, D), P(None, "x")), ((D, F), P("x", None))))
  assert found.flops == 2 * T * D * F / 4
  (one, count), *others = found.collectives.items()
  assert (one.kind, one.groups, count, others) == ("all-reduce", ((0, 1, 2, 3),), 1, [])
  assert one.size in (2 * T * F, 4 * T * F)  # whether it sums in bfloat16 or float32
  assert one.sent == one.size * 2 * 3 / 4


def test_split_weights_are_gathered_and_their_gradients_scattered(mesh):
  size, layers = 1024, 5

  def loss(up_XDF, down_XDF, x_TD):
    def layer(x, weights):
      weights = jax.lax.with_sharding_constraint(weights, NamedSharding(mesh, P()))
      return jax.lax.with_sharding_constraint(mlp(x, weights), NamedSharding(mesh, P("x"))), None

    return jax.lax.scan(layer, x_TD, (up_XDF, down_XDF))[0].astype(jnp.float32).sum()

  weights = ((layers, size, size), P(None, "x", None))
  rows = ((4 * size, size), P("x"))
  program = compiled(
    mesh, jax.grad(loss, argnums=(0, 1)), weights, weights, rows, out=(weights[1],) * 2
  )
  found = cost(program)
  total = 2 * layers * 2 * size * size
  assert found.of_kind("all-gather") == (2 * layers, total, total * 3 / 4)
  count, scattered, sent = found.of_kind("reduce-scatter")
  assert count in (layers, 2 * layers)  # both weights of a layer at once, or one by one
  assert (scattered, sent) == (total, total * 3 / 4)
  assert found.of_kind("all-reduce")[0] == 0


def test_an_exchange_beside_computation_counts_once():
  gather = (
    "all-gather(%p), channel_id=1, replica_groups={{0,1,2,3}}, dimensions={0}, "
    'backend_config={"async_collective_fusion_config":{"flag_start":"FLAG","flag_end":"8"}}'
  )
  text = """HloModule m, num_partitions=4

%start (p: bf16[8,128]) -> (bf16[8,128], bf16[32,128], u32[]) {
  %p = SHARD parameter(0)
  %g = WHOLE START
  ROOT %c = (SHARD, WHOLE, u32[]{:S(2)}) custom-call(%g), custom_call_target="AsyncCollectiveStart"
}

%beside (p: bf16[8,128], q: bf16[32,128], x: f32[64,32]) -> (f32[64,64], …) {
  %p = SHARD parameter(0)
  %q = WHOLE parameter(1)
  %x = f32[64,32]{1,0} parameter(2)
  %g = WHOLE LATER
  %d = f32[64,64]{1,0} convolution(%x, %x), dim_labels=bf_oi->bf
  ROOT %t = (f32[64,64]{1,0}, SHARD, WHOLE) tuple(%d, %p, %g)
}

%done (p: bf16[8,128], q: bf16[32,128]) -> bf16[32,128] {
  %p = SHARD parameter(0)
  %q = WHOLE parameter(1)
  %g = WHOLE LATER
  ROOT %c = WHOLE custom-call(%p, %q, %g), custom_call_target="AsyncCollectiveDone"
}

ENTRY %main (a: bf16[8,128], x: f32[64,32]) -> bf16[32,128] {
  %a = SHARD parameter(0)
  %x = f32[64,32]{1,0} parameter(1)
  %s = (SHARD, WHOLE, u32[]{:S(2)}) fusion(%a), kind=kCustom, calls=%start
  %p = SHARD get-tuple-element(%s), index=0
  %q = WHOLE get-tuple-element(%s), index=1
  %b = (f32[64,64]{1,0}, SHARD, WHOLE) fusion(%p, %q, %x), kind=kOutput, calls=%beside
  %h = WHOLE get-tuple-element(%b), index=2
  ROOT %r = WHOLE fusion(%p, %h), kind=kCustom, calls=%done
}
"""
  text = text.replace("SHARD", "bf16[8,128]{1,0}").replace("WHOLE", "bf16[32,128]{1,0}")
  text = text.replace("START", gather.replace("FLAG", "-1"))
  found = costs_of.program_costs(text.replace("LATER", gather.replace("FLAG", "2")))
  whole = 2 * 32 * 128
  assert found.of_kind("all-gather") == (1, whole, whole * 3 / 4)
  assert found.flops == 2 * 64 * 64 * 32
  # The shard is read and the whole written once; beside it, the product's factor and result.
  assert found.hbm_bytes == whole / 4 + whole + 4 * (64 * 32 + 64 * 64)


def test_exchanges_between_slices_are_told_apart():
  devices = parse_topology("v5e:2x2", slices=2).devices
  mesh = Mesh(np.array(devices).reshape(2, 4), ("replica", "x"), axis_types=(AxisType.Auto,) * 2)
  summed = compiled(
    mesh, lambda x, y: x.T @ y, ((T, D), P("replica", None)), ((T, F), P("replica", None))
  )
  assert cost(summed).dcn_bytes >= 2 * D * F / 4
  assert cost(summed).dcn_bytes <= 4 * D * F


ALL_REDUCE = """HloModule m, num_partitions=4

ENTRY %main (p: f32[8]) -> f32[8] {
  %p = f32[8]{0} parameter(0)
  ROOT %r = f32[8]{0} all-reduce(%p), channel_id=1, GROUPS, use_global_device_ids=true
}
"""


@pytest.mark.parametrize(
  "written, groups",
  [
    ("replica_groups={{0,2},{1,3}}", ((0, 2), (1, 3))),
    ("replica_groups={}", ((0, 1, 2, 3),)),
    ("replica_groups=[2,2]<=[4]", ((0, 1), (2, 3))),
    ("replica_groups=[2,2]<=[2,2]T(1,0)", ((0, 2), (1, 3))),
    ("replica_groups=mesh['a'=2,'b'=2] {'a'}", ((0, 2), (1, 3))),
    ("replica_groups=mesh['a'=2,'b'=2] {'a','b'}", ((0, 1, 2, 3),)),
    ("replica_groups=mesh['a'=4] {'a':(2)2}", ((0, 1), (2, 3))),
    ("replica_groups=mesh['a'=4] {'a':(1)2}", ((0, 2), (1, 3))),
    ("replica_groups=mesh['a'=2,'b'=2], device_ids=([2,2]T(1,0)) {'a'}", ((0, 1), (2, 3))),
  ],
)
def test_groups_of_devices_are_read_however_they_are_written(written, groups):
  (one,) = costs_of.program_costs(ALL_REDUCE.replace("GROUPS", written)).collectives
  assert (one.kind, one.size, one.groups) == ("all-reduce", 32, groups)


def test_devices_grouped_in_an_unknown_way_are_refused():
  with pytest.raises(ValueError, match="replica_groups=<4 by 2>"):
    costs_of.program_costs(ALL_REDUCE.replace("GROUPS", "replica_groups=<4 by 2>"))


# ------------------------------------------------------------------ bytes and arrays


def test_an_element_wise_operation_moves_what_it_reads_and_writes(mesh):
  big = (4096, 16384)  # does not fit in VMEM
  program = compiled(mesh, lambda x, y: x + 2 * y, (big, P()), (big, P()))
  assert cost(program).hbm_bytes == 3 * 2 * np.prod(big)


def test_a_scan_reads_of_stacked_weights_one_layer_at_a_time(mesh):
  layers, size = 16, 2048
  weights = ((layers, size, size), P())
  loop = lambda x, weights: jax.lax.scan(lambda x, w: (x @ w, None), x, weights)[0]
  program = compiled(mesh, loop, ((8, size), P()), weights)
  assert cost(program).hbm_bytes == pytest.approx(layers * 2 * size**2, rel=0.02)


def test_a_scan_writes_of_stacked_results_one_layer_at_a_time(mesh):
  layers, size = 16, 2048

  def loop(x):
    return jax.lax.scan(lambda x, _: (x * 2, x + 1), x, length=layers)[1]

  program = compiled(mesh, loop, ((size, size), P()))
  one = 2 * size**2
  assert layers * one <= cost(program).hbm_bytes <= 3.1 * layers * one


def test_padding_of_tiles_is_in_memory_and_not_in_the_size():
  (array,) = hlo.arrays_of("f32[10,1,64]{2,0,1:T(8,128)}")
  assert (array.size, array.laid_out, array.hbm) == (4 * 640, 4 * 16 * 128, 4 * 16 * 128)
  (array,) = hlo.arrays_of("bf16[16,128]{1,0:T(8,128)(2,1)S(1)}")
  assert (array.size, array.laid_out, array.hbm) == (4096, 4096, 0)


def test_stored_arrays_are_found_and_those_within_a_fusion_are_not(mesh):
  logits = lambda x, y: (x @ y).astype(jnp.float32)

  def chunks(x, y):
    parts = x.reshape(4, T // 4, D)
    return jax.lax.map(lambda part: jax.nn.logsumexp(logits(part, y), axis=-1), parts)

  arguments = ((T, D), P()), ((D, 4096), P())
  text = compiled(mesh, chunks, *arguments).as_text()
  assert not hlo.has_shape(text, (T, 4096))
  assert hlo.has_shape(text, (D, 4096), "bf16")
  assert not hlo.has_shape(text, (D, 4096), "f32")
  whole = compiled(mesh, logits, *arguments).as_text()
  assert hlo.has_shape(whole, (T, 4096), "f32")
  size, array, _ = hlo.largest_arrays(whole)[0]
  assert (size, array) == (4 * T * 4096, f"f32[{T},4096]")


def test_a_text_that_is_no_program_is_refused():
  with pytest.raises(ValueError, match="ENTRY"):
    hlo.parse("HloModule nothing\n")
