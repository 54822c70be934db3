"""The programs of a run, compiled for TPUs that are not there."""

from pathlib import Path
from typing import Any

import jax
from flax import nnx
from jax.sharding import Mesh

from alignx_jax import experiment as experiments
from alignx_jax.ahead import flops
from alignx_jax.ahead.advice import advise
from alignx_jax.ahead.chips import Topology
from alignx_jax.ahead.costs import program_costs
from alignx_jax.ahead.report import Work, make_report, out_of_memory_report
from alignx_jax.data.formatting import Formatting
from alignx_jax.data.prepared import prepared_space
from alignx_jax.data.proposals import proposed_regions
from alignx_jax.data.rows import Regions
from alignx_jax.data.tokenizers import find_file, load_tokenizer
from alignx_jax.models.decoder import Decoder
from alignx_jax.models.presets import Architecture, get_architecture
from alignx_jax.models.pretrained import read_architecture
from alignx_jax.models.splash import PackedMask, _blocks
from alignx_jax.personas.persona import HistoryPolicy
from alignx_jax.training import mesh as meshes
from alignx_jax.training.optimizer import make_optimizer
from alignx_jax.training.steps import make_steps, param_shapes, row_shapes, score_step


def compile_programs(
  config: Any, topology: Topology, *, examples_per_row: float = 0, texts: Path | None = None
) -> dict[str, dict]:
  """Compiles what a run of a config would run, from shapes alone, and tells what it costs.

  Args:
    config: configs/base.py's. Neither weights nor data need to be there if
      config.model.preset and the sizes of config.regions are set.
    examples_per_row: how many a packed row holds on average; 0: config.regions.examples.
    texts: a directory for the compiled programs' texts; None: they are not kept.
  Returns:
    Reports (report.make_report) of "train", "reference" (unless it is computed online) and
    "evaluation"; those that do not fit have "advice".
  Raises:
    ValueError: sizes that do not go together; names the fields.
  """
  mesh = meshes.make_mesh(config.mesh, topology.devices)
  experiments._check_sizes(config, mesh)
  arch = architecture(config)
  model = experiments.abstract_model(config, arch, platform="tpu")
  regions = regions_of(config)
  examples_per_row = examples_per_row or regions.examples
  online = config.reference.kind == "online"

  def report(name, lower, needed, rows, parts, train=False):
    work = Work(
      needed_flops=needed,
      kernel_flops=kernel_flops(model, regions, rows // parts, mesh),
      examples=rows * examples_per_row,
      tokens=rows * regions.layout,
    )
    try:
      with jax.set_mesh(mesh):
        compiled = lower().compile()
    except jax.errors.JaxRuntimeError as error:
      found = out_of_memory_report(name, str(error), topology=topology)
    else:
      text = compiled.as_text()
      if texts is not None:
        texts.mkdir(parents=True, exist_ok=True)
        (texts / f"{name}.hlo.txt").write_text(text, encoding="utf-8")
      found = make_report(
        name,
        topology=topology,
        devices=list(mesh.devices.flat),
        memory=compiled.memory_analysis(),
        costs=program_costs(text),
        work=work,
      )
    if train and not found["fits"]:
      found["advice"] = advise(found, config, arch, regions, mesh.shape)
    return found

  # The number of steps is a constant of the schedule: any will do.
  steps = make_steps(config, model, mesh, regions, make_optimizer(config.optimizer, 1000))
  rows = config.train.rows
  needed = flops.train_flops(arch, regions, rows, frozen=config.lora.rank > 0, online=online)
  lower = lambda: steps.train.lower(steps.state, steps.frozen, steps.rows)
  found = {"train": report("train", lower, needed, rows, config.train.accumulation, train=True)}

  def score(name, rows):
    lower = lambda: score_step.lower(
      param_shapes(model, mesh),
      row_shapes(regions, rows, mesh),
      graph=nnx.graphdef(model),
      mesh=mesh,
      chunk=config.train.head_chunk,
    )
    return report(name, lower, flops.forward_flops(arch, regions, rows), rows, 1)

  if not online:
    found["reference"] = score("reference", rows)
  # It is the same program as the reference's if it takes as many rows.
  same = not online and rows == config.eval.rows
  found["evaluation"] = (
    found["reference"] | {"program": "evaluation"}
    if same
    else score("evaluation", config.eval.rows)
  )
  return found


def architecture(config: Any) -> Architecture:
  """The architecture of config.model, by its name or from the files of the weights."""
  if config.model.preset:
    return get_architecture(config.model.preset)
  weights = config.model.weights
  if not weights:
    raise ValueError("Set config.model.preset, or config.model.weights to a model that is there.")
  if weights.startswith("preset:"):
    return get_architecture(weights.removeprefix("preset:"))
  return read_architecture(find_file(weights))


def regions_of(config: Any) -> Regions:
  """The sizes of config.regions, or those proposed for its data, tokenizer and prompts."""
  regions = Regions(config.regions.context, config.regions.response, config.regions.examples)
  if not config.regions.layout:
    return regions
  formatting = Formatting(
    tokenizer=load_tokenizer(config.model.tokenizer or find_file(config.model.weights)),
    space=prepared_space(config.data.path),
    regions=regions,
    chat=config.prompt.chat,
    prompt=config.prompt.format,
    condition=experiments.OBJECTIVES[config.objective.name],
    history=HistoryPolicy(**config.history),
  )
  return proposed_regions(config.data.path, formatting, config.regions.layout)


def kernel_flops(model: Decoder, regions: Regions, rows: int, mesh: Mesh) -> dict[str, float]:
  """FLOPs of one call of each splash kernel on one device; none without splash attention.

  Args:
    rows: of one part of a step, over all devices.
  """
  if model.attention != "splash":
    return {}
  from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash

  shards, L = mesh.shape["context"], regions.layout
  queries, halves = L // shards, 1 if shards == 1 else 2
  block_q, piece = _blocks("block_q", model.block, -(-queries // halves))
  block_kv, keys = _blocks("block_kv", model.block, L)
  mask = PackedMask(
    regions.context,
    regions.context + regions.response,
    queries=queries,
    padded=piece * halves,
    keys=keys,
    shards=shards,
  )
  sizes = {f"block_q{kernel}": block_q for kernel in ("", "_dq", "_dkv")}
  sizes |= {name.replace("_q", "_kv", 1): block_kv for name in sizes}
  return flops.splash_flops(
    mask,
    splash.BlockSizes(**sizes),
    rows=rows // meshes.row_shards(mesh),
    heads=model.arch.heads // mesh.shape["tensor"],
    head_width=model.arch.head_width,
    query_shards=shards,
  )
