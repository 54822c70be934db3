"""FLOPs by formula, against compiled programs and against the kernels themselves."""

import dataclasses
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from alignx_jax.ahead import flops
from alignx_jax.ahead.chips import parse_topology
from alignx_jax.ahead.costs import program_costs
from alignx_jax.data.rows import Regions, Rows
from alignx_jax.models.bridge import VALUES, add_bridge, infer
from alignx_jax.models.decoder import Decoder
from alignx_jax.models.presets import Architecture, get_architecture
from alignx_jax.objectives.log_probs import response_log_probs
from alignx_jax.objectives.pba import BridgeObjective, bridged_log_probs
from alignx_jax.training.steps import row_shapes

pytestmark = pytest.mark.usefixtures("optimised")

os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")

ARCH = Architecture(
  vocab_size=1024, width=256, layers=5, heads=4, kv_heads=2, head_width=128, feed_forward=512
)
REGIONS = Regions(context=256, response=128, examples=4)
ROWS = 2


@pytest.fixture(scope="module")
def device():
  return NamedSharding(
    Mesh(np.array(parse_topology("v5e:2x2").devices[:1]), ("x",)), PartitionSpec()
  )


def compiled_costs(device, *, train=False, **options):
  """Costs of scoring rows, or of the gradient of their sum, on one v5e."""
  make = lambda: Decoder(ARCH, rngs=nnx.Rngs(0), compute_dtype="bfloat16", **options)
  graph, params = nnx.split(nnx.eval_shape(make))
  B, L, R, E = ROWS, REGIONS.layout, REGIONS.response, REGIONS.examples
  shapes = [(B, L)] * 3 + [(B, 2, R), (B, E), (B, 2, E), (B, E)]
  types = [jnp.int32] * 4 + [jnp.float32] * 2 + [jnp.int32]
  rows = Rows(*map(jax.ShapeDtypeStruct, shapes, types))

  def score(params, rows):
    return response_log_probs(nnx.merge(graph, params), rows, chunk=R // 2)

  def loss(params, rows):
    return (score(params, rows) ** 2).sum()  # whose gradient needs the scores

  given = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device), (params, rows)
  )
  return program_costs(
    jax.jit(jax.grad(loss) if train else score).lower(*given).compile().as_text()
  )


def dense_pairs(regions):
  """Pairs of positions that attention.py scores, in blocks of 256."""
  C, R = regions.context, regions.response
  pairs = sum((min(s + 256, C) - s) * min(s + 256, C) for s in range(0, C, 256))
  return pairs + 2 * R * C + 2 * R * R


def scores_again(regions=REGIONS):
  """The backward pass computes the scores once more."""
  return ROWS * 2 * ARCH.layers * ARCH.heads * ARCH.head_width * dense_pairs(regions)


def dense_attention(regions=REGIONS):
  """What attention.py computes beyond what the mask needs, in blocks of 256."""
  C, R = regions.context, regions.response
  pairs = dense_pairs(regions)
  needed = C * (C + 1) / 2 + 2 * R * C + R * (R + 1)
  return ROWS * 4 * ARCH.layers * ARCH.heads * ARCH.head_width * (pairs - needed)


def test_scoring_executes_what_the_formula_says(device):
  needed = flops.forward_flops(ARCH, REGIONS, ROWS)
  assert compiled_costs(device, remat=False).flops == needed + dense_attention()


@pytest.mark.slow
def test_training_executes_three_times_as_much_and_the_heads_chunks_again(device):
  needed = flops.train_flops(ARCH, REGIONS, ROWS)
  again = 2 * ARCH.width * ARCH.vocab_size * 2 * REGIONS.response * ROWS
  executed = compiled_costs(device, remat=False, train=True).flops
  assert executed == pytest.approx(
    needed + 3 * dense_attention() + again + scores_again(), rel=1e-6
  )


def test_an_8b_model_needs_six_flops_a_parameter_and_token():
  arch = get_architecture("llama31_8b")
  regions = Regions(context=6144, response=1024, examples=8)
  parameters = 8.03e9 - 2 * arch.vocab_size * arch.width
  head = arch.vocab_size * arch.width * 2 * regions.response / regions.layout
  rule = 6 * (parameters + head) * regions.layout
  # And a tenth for attention.
  assert 1.05 < flops.train_flops(arch, regions, 1) / rule < 1.15


def test_a_row_of_one_full_example_needs_what_the_example_needs():
  C, R = REGIONS.context, REGIONS.response
  assert flops.forward_flops(ARCH, REGIONS, 3) == 3 * flops.example_flops(ARCH, C, R, R)
  halves = 2 * flops.example_flops(ARCH, C // 2, R // 2, R // 2)
  assert halves < flops.forward_flops(ARCH, REGIONS, 1)


def test_frozen_weights_and_an_online_reference_change_what_a_step_needs():
  needed = flops.train_flops(ARCH, REGIONS, ROWS)
  forward = flops.forward_flops(ARCH, REGIONS, ROWS)
  frozen = flops.train_flops(ARCH, REGIONS, ROWS, frozen=True)
  assert 2 * forward < frozen < needed
  assert flops.train_flops(ARCH, REGIONS, ROWS, frozen=True, online=True) == frozen + forward


# ------------------------------------------------------------------ a learned bridge

BRIDGE = flops.BridgeSizes(dimensions=8, size=128)
BRIDGED = Regions(context=224, response=128, examples=4, persona=256, parts=8)
OBJECTIVE = BridgeObjective(
  label_weight=0.1,
  act_weight=1.0,
  class_weights=(1.0, 1.0, 1.0),
  forcing=(0.0, 0.0),
  forcing_steps=1.0,
  dpo_gradient=True,
  seed=0,
)


def bridged_costs(device, program, **given):
  """Costs of program(model, rows) on one v5e."""

  def make():
    model = Decoder(ARCH, rngs=nnx.Rngs(0), compute_dtype="bfloat16", remat=False)
    add_bridge(model, BRIDGE.dimensions, size=BRIDGE.size, rngs=nnx.Rngs(1))
    return model

  graph, params = nnx.split(nnx.eval_shape(make))
  mesh = Mesh(device.mesh.devices.reshape(1, 1), ("replica", "fsdp"))
  place = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device)
  rows = row_shapes(BRIDGED, ROWS, mesh, dimensions=BRIDGE.dimensions, **given)
  given = jax.tree.map(place, (params, rows))
  compiled = jax.jit(lambda params, rows: program(graph, params, rows)).lower(*given).compile()
  return program_costs(compiled.as_text())


def membership():
  """What the head's sums over parts cost as matrix products beyond what they need."""
  U, X, E, P, V = BRIDGED.persona, BRIDGED.parts, BRIDGED.examples, BRIDGE.dimensions, VALUES
  return ROWS * 2 * 2 * P * (1 + V) * (U * (X - 1) + X * E)


def test_inferring_preferences_executes_what_the_formula_says(device):
  program = lambda graph, params, rows: infer(nnx.merge(graph, params), rows.personas)[0]
  executed = bridged_costs(device, program)
  needed = flops.infer_flops(ARCH, BRIDGED, ROWS, BRIDGE)
  expected = needed + dense_attention(flops.persona_rows(BRIDGED)) + membership()
  assert executed.flops == pytest.approx(expected, rel=1e-4)
  # Of which the head is enough to be seen.
  decoder = flops.forward_flops(ARCH, flops.persona_rows(BRIDGED), ROWS)
  assert needed - decoder > 0.01 * needed


def test_scoring_with_given_preferences_executes_what_the_formula_says(device):
  def score(graph, params, rows):
    return response_log_probs(nnx.merge(graph, params), rows, rows.preferences_BEPK, chunk=64)

  needed = flops.forward_flops(ARCH, BRIDGED, ROWS, BRIDGE)
  told = flops.bridged(BRIDGED, BRIDGE.dimensions)
  assert told.layout == BRIDGED.layout + 4 * 8
  executed = bridged_costs(device, score, given=True).flops
  assert executed == pytest.approx(needed + dense_attention(told), rel=1e-4)


@pytest.mark.slow
def test_training_a_bridge_executes_three_times_as_much(device):
  def loss(params, graph, rows):
    log_probs, head_loss, _ = bridged_log_probs(
      nnx.merge(graph, params), rows, OBJECTIVE, 0, chunk=64
    )
    return (log_probs**2).sum() + head_loss.sum()

  gradient = lambda graph, params, rows: jax.grad(loss)(params, graph, rows)
  needed = flops.train_flops(ARCH, BRIDGED, ROWS, bridge=BRIDGE)
  shapes = flops.bridged(BRIDGED, BRIDGE.dimensions), flops.persona_rows(BRIDGED)
  again = 2 * ARCH.width * ARCH.vocab_size * 2 * BRIDGED.response * ROWS
  again += sum(map(scores_again, shapes))
  expected = needed + again + 3 * (sum(map(dense_attention, shapes)) + membership())
  assert bridged_costs(device, gradient).flops == pytest.approx(expected, rel=1e-3)


def test_a_bridge_trained_alone_and_an_adapter_beside_it_change_what_a_step_needs():
  needed = lambda **options: flops.train_flops(ARCH, BRIDGED, ROWS, **options)
  alone = dataclasses.replace(BRIDGE, alone=True)
  assert needed(bridge=alone) < needed(bridge=BRIDGE, frozen=True) < needed(bridge=BRIDGE)
  assert needed(bridge=alone, frozen=True) == needed(bridge=alone)
  # The reference reads the prompt alone.
  online = needed(bridge=BRIDGE, frozen=True, online=True) - needed(bridge=BRIDGE, frozen=True)
  assert online == flops.forward_flops(ARCH, BRIDGED, ROWS)


# ------------------------------------------------------------------ the splash kernels


def block_sizes(query, key, **options):
  names = ("block_q", "block_q_dkv") if options else ("block_q", "block_q_dkv", "block_q_dq")
  sizes = {name: query for name in names}
  sizes |= {name.replace("_q", "_kv", 1): key for name in names}
  return splash.BlockSizes(**sizes, **options)


def products_of(jaxpr):
  """Matrix products of one block in each kernel of a jaxpr."""
  found = {}
  for equation in jaxpr.eqns:
    inner = [getattr(x, "jaxpr", x) for x in equation.params.values()]
    inner = [x for x in inner if hasattr(x, "eqns")]
    if equation.primitive.name == "pallas_call":
      (kernel,) = inner
      found[equation.params["name"]] = str(kernel).count(" dot_general[")
    else:
      for other in inner:
        found |= products_of(other)
  return found


@pytest.mark.parametrize("fused", [False, True])
def test_the_kernels_make_the_products_that_are_counted(fused):
  L, A = 256, 128
  blocks = block_sizes(L, L, **({"use_fused_bwd_kernel": True} if fused else {}))
  kernel = splash.make_splash_mha(
    masks.MultiHeadMask([masks.CausalMask((L, L))]),
    head_shards=1,
    q_seq_shards=1,
    block_sizes=blocks,
  )
  x = jax.ShapeDtypeStruct((1, L, A), jnp.bfloat16)
  loss = lambda *qkv: kernel(*qkv).astype(jnp.float32).sum()
  found = products_of(jax.make_jaxpr(jax.grad(loss, argnums=(0, 1, 2)))(x, x, x).jaxpr)
  counted = dict(flops.SPLASH_PRODUCTS)
  if fused:
    counted = {"fwd": counted["fwd"], "dkv": flops.FUSED_DKV_PRODUCTS}
  assert len(found) == len(counted)
  for part, products in counted.items():
    assert [count for name, count in found.items() if f"_{part}_" in f"{name}_"] == [products]


def test_blocks_of_a_causal_mask_are_counted_by_kernel():
  L, heads, width = 1024, 3, 64
  blocks = splash.BlockSizes(
    block_q=256,
    block_kv=256,
    block_q_dkv=512,
    block_kv_dkv=256,
    block_q_dq=128,
    block_kv_dq=512,
  )
  found = flops.splash_flops(
    masks.CausalMask((L, L)), blocks, rows=2, heads=heads, head_width=width
  )
  one = 2 * 2 * heads * width
  assert found == {
    "fwd": one * 2 * 10 * 256 * 256,
    "dkv": one * 4 * (2 + 4) * 512 * 256,
    "dq": one * 3 * (4 * 1 + 4 * 2) * 128 * 512,
  }


def test_the_busiest_shard_of_queries_counts():
  mask = np.tril(np.ones((1024, 1024), bool))
  assert flops.filled_blocks(mask, 256, 256) == 10
  assert flops.filled_blocks(mask, 256, 256, shards=2) == 7


def test_a_fused_backward_pass_is_one_kernel():
  blocks = block_sizes(256, 256, use_fused_bwd_kernel=True)
  found = flops.splash_flops(masks.CausalMask((256, 256)), blocks, rows=1, heads=1, head_width=64)
  assert found == {"fwd": 2 * 2 * 64 * 256**2, "dkv": 2 * 5 * 64 * 256**2}


@pytest.mark.slow
def test_kernels_in_a_program_are_counted_in_loops(device):
  kernels = compiled_costs(device, train=True, attention="splash", block=256).kernels
  calls = {part: 0 for part in flops.SPLASH_PRODUCTS}
  for kernel, count in kernels.items():
    assert kernel.length == REGIONS.layout
    (part,) = [part for part in calls if f"_{part}_" in f"{kernel.name}_"]
    calls[part] += count
  assert calls["dq"] == calls["dkv"] == ARCH.layers
  assert calls["fwd"] in (ARCH.layers, 2 * ARCH.layers)  # again, if its results are not kept
