"""Which config fields make a program that is too big fit, and by about how much."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from alignx_jax.ahead.chips import GIB
from alignx_jax.data.rows import Regions
from alignx_jax.models.presets import Architecture

BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclasses.dataclass(frozen=True)
class Sizes:
  """GiB on one chip of what can be made smaller; estimates from shapes alone.

  Attributes:
    parameters: in the type they are stored in.
    state: with AdamW's two moments and the gradient, float32.
    residuals: what each layer keeps for the backward pass when the rest is recomputed.
    layer: activations within one layer.
    logits: of one chunk of the head, with their gradient.
    gathered: one layer's weights and the head, gathered to be used.
  """

  parameters: float
  state: float
  residuals: float
  layer: float
  logits: float
  gathered: float


def sizes(config: Any, arch: Architecture, regions: Regions, mesh: Mapping[str, int]) -> Sizes:
  """Sizes of a training step.

  Args:
    regions: with the positions that a learned bridge adds to the context (flops.bridged).
    mesh: devices along each axis, `mesh.shape`.
  """
  D, F, V = arch.width, arch.feed_forward, arch.vocab_size
  attention = (arch.heads + 2 * arch.kv_heads) * arch.head_width
  layer = D * (attention + arch.heads * arch.head_width) + 3 * D * F
  parameters = arch.layers * layer + (1 if arch.tied else 2) * V * D
  shards = mesh["fsdp"] * mesh["tensor"] * mesh["context"]
  stored, computed = BYTES[config.model.param_dtype], BYTES[config.model.compute_dtype]
  rows = config.train.rows / config.train.accumulation / (mesh["replica"] * mesh["fsdp"])
  kept = rows * (regions.layout + regions.persona) / mesh["context"]
  positions = rows * max(regions.layout, regions.persona) / mesh["context"]
  trained = 0 if config.lora.rank else parameters / shards
  chunk = min(config.train.head_chunk, regions.response)
  return Sizes(
    parameters=parameters / shards * stored / GIB,
    state=(parameters / shards * stored + trained * 12) / GIB,
    residuals=arch.layers * kept * D * computed / GIB,
    layer=positions * (4 * D + (attention + 3 * F) / mesh["tensor"]) * computed / GIB,
    logits=2 * rows * 2 * chunk / mesh["context"] * V / mesh["tensor"] * 4 / GIB,
    gathered=(layer + V * D) / mesh["tensor"] * computed / GIB,
  )


def advise(
  report: dict, config: Any, arch: Architecture, regions: Regions, mesh: Mapping[str, int]
) -> list[dict]:
  """What to change when a training step does not fit, what saves most first, more chips last.

  Args:
    report: report.make_report's or out_of_memory_report's.
    regions: as `sizes` takes them.
  Returns:
    {"change": fields and values, "saves_gib": about so much on each chip, "why"}; empty if it
    fits.
  """
  if report["fits"]:
    return []
  size = sizes(config, arch, regions, mesh)
  rows = config.train.rows // (mesh["replica"] * mesh["fsdp"])
  part = rows // config.train.accumulation
  halves = (size.residuals + size.layer + size.logits) / 2
  over = report["hbm_gib_per_chip"] - report["hbm_gib_available"]
  fewer = {"config.mesh.fsdp": mesh["fsdp"] // 2}
  more = {"config.train.accumulation": 2 * config.train.accumulation}
  found = []

  def suggest(change, saves, why):
    found.append({"change": change, "saves_gib": round(saves, 2), "why": why})

  if not config.model.remat:
    suggest(
      {"config.model.remat": True},
      (arch.layers - 1) * size.layer,
      "layers are computed again in the backward pass, a third more time, not kept",
    )
  if part > 1 and part % 2 == 0:
    parts = 2
    while 2 * halves * (1 - 1 / parts) < over and part % (2 * parts) == 0:
      parts *= 2
    suggest(
      {"config.train.accumulation": parts * config.train.accumulation},
      2 * halves * (1 - 1 / parts),
      f"a device holds {part // parts} rows at a time, not {part}; the update is the same",
    )
  elif mesh["fsdp"] % 2 == 0:
    suggest(
      fewer | more | {"config.mesh.context": 2 * mesh["context"]},
      halves,
      "a device holds half of each row's positions; rows of a step must divide by the parts",
    )
    suggest(
      fewer | more | {"config.mesh.tensor": 2 * mesh["tensor"]},
      (size.layer + size.logits + size.gathered) / 2,
      "heads, feed-forward layer and vocabulary are split further",
    )
  if config.model.param_dtype == "float32":
    suggest(
      {"config.model.param_dtype": "bfloat16"},
      size.parameters / 2,
      "weights are stored in half; moments stay float32 and updates are rounded by chance",
    )
  if config.train.head_chunk >= 128:
    suggest(
      {"config.train.head_chunk": config.train.head_chunk // 2},
      size.logits / 2,
      "half as many logits at a time",
    )
  found.sort(key=lambda item: -item["saves_gib"])
  suggest(
    {"chips": 2 * report["chips"]},
    size.state / 2 + (halves if part > 1 else 0),
    "parameters and moments are split further, and so are the rows if there are enough",
  )
  return found


def advice_text(report: dict, advice: list[dict]) -> str:
  """The advice as lines for a person."""
  over = report["hbm_gib_per_chip"] - report["hbm_gib_available"]
  lines = [f"  {over:.2f} GiB must go on each chip. About so many would be saved by"]
  for item in advice:
    change = " ".join(
      f"--{name}={value}" if "." in name else f"{value} {name}"
      for name, value in item["change"].items()
    )
    lines += [f"    {item['saves_gib']:6.2f}  {change}", f"            {item['why']}"]
  return "\n".join(lines)
