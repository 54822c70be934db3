"""The programs of a run, compiled for TPUs that are not there."""

import math
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
from alignx_jax.ahead.report import Work, held_beside, make_report, out_of_memory_report
from alignx_jax.data.prepared import prepared_space
from alignx_jax.data.rows import Regions
from alignx_jax.data.tokenizers import find_file, load_tokenizer
from alignx_jax.models.decoder import Decoder
from alignx_jax.models.splash import plan
from alignx_jax.training import mesh as meshes
from alignx_jax.training.optimizer import make_optimizer
from alignx_jax.training.steps import make_steps, param_shapes, row_shapes, score_program


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
  experiments.check_sizes(config, mesh)
  arch = experiments.architecture(config)
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
      found = out_of_memory_report(name, str(error), topology=topology, work=work)
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
    program = score_program(nnx.graphdef(model), mesh, config.train.head_chunk)
    lower = lambda: program.lower(param_shapes(model, mesh), row_shapes(regions, rows, mesh))
    return report(name, lower, flops.forward_flops(arch, regions, rows), rows, 1)

  if not online:
    found["reference"] = score("reference", rows)
  # It is the same program as the reference's if it takes as many rows.
  same = not online and rows == config.eval.rows
  alone = (
    found["reference"] | {"program": "evaluation"}
    if same
    else score("evaluation", config.eval.rows)
  )
  # A policy is scored while the base that it is compared with is kept.
  base = sum(
    math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize
    for x in jax.tree.leaves(param_shapes(model, mesh))
  )
  found["evaluation"] = held_beside(alone, "other_model", base)
  return found


def regions_of(config: Any) -> Regions:
  """The sizes of config.regions, or those proposed for its data, tokenizer and prompts."""
  if not config.regions.layout:
    return Regions(config.regions.context, config.regions.response, config.regions.examples)
  tokenizer = load_tokenizer(config.model.tokenizer or find_file(config.model.weights))
  return experiments.make_formatting(config, tokenizer, prepared_space(config.data.path)).regions


def kernel_flops(model: Decoder, regions: Regions, rows: int, mesh: Mesh) -> dict[str, float]:
  """FLOPs of one call of each splash kernel on one device; none without splash attention.

  Args:
    rows: of one part of a step, over all devices.
  """
  if model.attention != "splash":
    return {}
  shards = mesh.shape["context"]
  mask, sizes = plan(
    regions.layout,
    regions.response,
    shards=shards,
    block_q=model.block,
    block_kv=model.block,
  )
  return flops.splash_flops(
    mask,
    sizes,
    rows=rows // meshes.row_shards(mesh),
    heads=model.arch.heads // mesh.shape["tensor"],
    head_width=model.arch.head_width,
    query_shards=shards,
  )
