"""FLOPs that training needs, and those that the splash kernels execute; by formula.

A multiplication and an addition are two. Only matrix products are counted: norms, softmax,
rotary positions and the loss are below a percent of them.
"""

import dataclasses
import math
from typing import Any

from alignx_jax.data.rows import Regions
from alignx_jax.models.bridge import VALUES
from alignx_jax.models.presets import Architecture

# Matrix products of one block of queries and keys in each kernel. Forward: q·k and p·v. dq: q·k,
# do·v and ds·k. dkv: q·k, p·do, do·v and ds·q; when it gives dq as well, ds·k too.
SPLASH_PRODUCTS = {"fwd": 2, "dq": 3, "dkv": 4}
FUSED_DKV_PRODUCTS = 5


@dataclasses.dataclass(frozen=True)
class BridgeSizes:
  """Of a learned bridge.

  Attributes:
    dimensions: P.
    size: A, width of its queries and keys.
    alone: it is trained beside a frozen decoder.
  """

  dimensions: int
  size: int
  alone: bool = False


def bridge_sizes(config: Any, dimensions: int) -> BridgeSizes | None:
  """Of a config's learned bridge over so many dimensions; None for none."""
  return BridgeSizes(dimensions, config.bridge.size, config.bridge.alone) if dimensions else None


def bridged(regions: Regions, dimensions: int) -> Regions:
  """The rows that a policy with a bridge reads: E · P positions more before the context."""
  return dataclasses.replace(regions, context=regions.context + regions.examples * dimensions)


def persona_rows(regions: Regions) -> Regions:
  """The rows that a bridge reads: the persona region alone, without responses."""
  return Regions(regions.persona, 0, regions.examples)


def forward_flops(
  arch: Architecture, regions: Regions, rows: int, bridge: BridgeSizes | None = None
) -> float:
  """FLOPs to score packed rows once.

  Counts the decoder over all C + 2R positions, the head over the 2R response positions, and
  what the static attention mask lets through: the context causally, each branch its whole
  context region and itself causally. Segments and padding are ignored, so this is what full
  rows of one example each need: an upper bound for rows of several.

  Args:
    bridge: to which P̃ is given: E · P positions more, those of neutral dimensions, which
      nobody sees, too.
  """
  if bridge is None:
    return rows * _forward(arch, regions.context, regions.response, regions.response)
  told = forward_flops(arch, bridged(regions, bridge.dimensions), rows)
  return told + _tokens(arch, regions, rows, bridge)


def infer_flops(arch: Architecture, regions: Regions, rows: int, bridge: BridgeSizes) -> float:
  """FLOPs to infer P̃ of the personas of packed rows: the decoder over U positions, the bridge.

  The region's attention is counted as if it were one sequence: an upper bound, as its parts
  do not see each other. The sums over each part's tokens are counted as such, not as the
  matrix products with the parts' membership that they are computed by, X times as many.
  """
  return forward_flops(arch, persona_rows(regions), rows) + _bridge(arch, regions, rows, bridge)


def _tokens(arch: Architecture, regions: Regions, rows: int, bridge: BridgeSizes) -> float:
  return rows * regions.examples * 2 * bridge.dimensions * 3 * arch.width


def _bridge(arch: Architecture, regions: Regions, rows: int, bridge: BridgeSizes) -> float:
  D, A, V, poles = arch.width, bridge.size, VALUES, 2 * bridge.dimensions
  token = 2 * D * (A + V)  # key and value, of the hidden state and of the embedding
  token += poles * (A + 1 + V)  # scores; mass and value
  logits = regions.examples * poles * V * 3
  return 2 * (poles * D * A + rows * (regions.persona * token + logits))


def train_flops(
  arch: Architecture,
  regions: Regions,
  rows: int,
  *,
  frozen: bool = False,
  online: bool = False,
  bridge: BridgeSizes | None = None,
) -> float:
  """FLOPs of one step: the forward pass and, for the gradients, twice as much again.

  Nothing is counted twice that a program recomputes to save memory.

  Args:
    rows: of the step, over all devices and parts.
    frozen: no gradients of the weights, as with LoRA, whose factors are below a percent: a
      weight's products are then made twice, not three times.
    online: the reference is scored in the step: one more forward pass, without a bridge.
    bridge: P̃ is inferred, and then the policy reads it.
  """
  frozen = frozen or (bridge is not None and bridge.alone)

  def step(part):
    attention = rows * _attention(arch, part.context, part.response, part.response)
    forward = forward_flops(arch, part, rows)
    return 3 * forward - (forward - attention if frozen else 0)

  total = forward_flops(arch, regions, rows) if online else 0
  if bridge is None:
    return total + step(regions)
  total += step(bridged(regions, bridge.dimensions))
  total += 3 * (_tokens(arch, regions, rows, bridge) + _bridge(arch, regions, rows, bridge))
  # Nothing that the bridge reads is trained if it is trained alone.
  personas = persona_rows(regions)
  return total + (forward_flops(arch, personas, rows) if bridge.alone else step(personas))


def example_flops(arch: Architecture, context: int, chosen: int, rejected: int) -> float:
  """FLOPs to score one example alone, of so many tokens in each region, without padding.

  The sum over a row's examples is what the row needs exactly; what it needs less than
  `forward_flops` says goes to padding and to pairs of positions in different examples.
  """
  return _forward(arch, context, chosen, rejected)


def _forward(arch: Architecture, context: int, chosen: int, rejected: int) -> float:
  D, H, K, A, F = arch.width, arch.heads, arch.kv_heads, arch.head_width, arch.feed_forward
  weights = D * H * A + 2 * D * K * A + H * A * D + 3 * D * F  # q; k and v; o; the three of an MLP
  responses = chosen + rejected
  layers = 2 * arch.layers * weights * (context + responses)
  head = 2 * D * arch.vocab_size * responses
  return layers + head + _attention(arch, context, chosen, rejected)


def _attention(arch: Architecture, context: int, chosen: int, rejected: int) -> float:
  """Scores and mixtures of all pairs of positions that see each other."""

  def causal(size):
    return size * (size + 1) / 2

  pairs = causal(context)
  for response in (chosen, rejected):
    pairs += response * context + causal(response)
  return 4 * arch.layers * arch.heads * arch.head_width * pairs


def splash_flops(
  mask: Any, blocks: Any, *, rows: int, heads: int, head_width: int, query_shards: int = 1
) -> dict[str, float]:
  """FLOPs that one call of each splash kernel executes on one device.

  The kernels make all products of every block of the mask that is not empty, of its segments
  and its masked half too. Counted from jax/experimental/pallas/ops/tpu/splash_attention.

  Args:
    mask: [queries, keys], True where a query sees a key, the same for all heads; anything
      that gives rows when indexed [a:b, :], such as a splash Mask.
    blocks: splash BlockSizes.
    rows, heads: those on one device.
    query_shards: devices that the queries are split over in equal parts; all wait for the one
      that has most blocks.
  Returns:
    By kernel: "fwd", "dq" and "dkv"; no "dq" if the backward pass is fused, and neither if
    the blocks have no backward sizes.
  """
  sizes = {"fwd": (blocks.block_q, blocks.block_kv)}
  products = dict(SPLASH_PRODUCTS)
  if blocks.use_fused_bwd_kernel:
    products["dkv"] = FUSED_DKV_PRODUCTS
  elif blocks.block_q_dq:
    sizes["dq"] = (blocks.block_q_dq, blocks.block_kv_dq)
  if blocks.block_q_dkv:
    sizes["dkv"] = (blocks.block_q_dkv, blocks.block_kv_dkv)
  return {
    kernel: 2.0
    * products[kernel]
    * rows
    * heads
    * head_width
    * math.prod(size)
    * filled_blocks(mask, *size, shards=query_shards)
    for kernel, size in sizes.items()
  }


def filled_blocks(mask: Any, block_q: int, block_kv: int, *, shards: int = 1) -> int:
  """Blocks of a mask in which some query sees some key; of the shard that has most."""
  queries, keys = mask.shape
  counts = [0] * shards
  for start in range(0, queries, block_q):
    seen = mask[start : start + block_q, :].any(axis=0)
    shard = start // (queries // shards)
    counts[shard] += sum(seen[at : at + block_kv].any() for at in range(0, keys, block_kv))
  return int(max(counts))
