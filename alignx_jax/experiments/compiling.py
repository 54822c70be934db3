"""The programs of a run, compiled for TPUs that are not there."""

import collections
import dataclasses
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from alignx_jax.ahead import flops
from alignx_jax.ahead.advice import advise
from alignx_jax.ahead.chips import Topology
from alignx_jax.ahead.costs import program_costs
from alignx_jax.ahead.report import Work, held_beside, make_report, out_of_memory_report
from alignx_jax.data.prepared import prepared_space
from alignx_jax.data.rows import Regions
from alignx_jax.data.tokenizers import find_file, load_tokenizer
from alignx_jax.experiments import loading
from alignx_jax.experiments.config_checks import check_sizes, has_head, has_latent
from alignx_jax.models.decoder import Decoder
from alignx_jax.models.splash import plan
from alignx_jax.objectives.losses import reference_kind
from alignx_jax.training import mesh as meshes
from alignx_jax.training.bridge import bridge_objective
from alignx_jax.training.optimizer import make_optimizer
from alignx_jax.training.steps import (
  infer_program,
  make_steps,
  param_shapes,
  row_shapes,
  score_program,
)

_STEPS = 1000  # of a run; a constant of its schedules, on which no cost depends


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
    Reports (report.make_report) of "train", "reference" (if it is computed before),
    "evaluation" and, with a learned bridge, "inference" of P̃; those that do not fit have
    "advice".
  Raises:
    ValueError: sizes that do not go together; names the fields.
  """
  mesh = meshes.make_mesh(config.mesh, topology.devices)
  check_sizes(config, mesh)
  if has_latent(config):
    raise ValueError(
      "The FLOPs of a latent user variable's encoder are not counted: set config.objective.name to "
      "another than 'vpl', such as 'dpo', which needs somewhat less."
    )
  arch = loading.architecture(config)
  space = loading.data_space(config)
  dimensions = loading.bridge_dimensions(config, space)
  model = loading.abstract_model(config, arch, platform="tpu", dimensions=dimensions)
  bridge = flops.bridge_sizes(config, dimensions)
  regions = regions_of(config)
  prompts = dataclasses.replace(regions, persona=0, parts=0)
  policy, personas = flops.bridged(regions, dimensions), flops.persona_rows(regions)
  examples_per_row = examples_per_row or regions.examples
  reference = reference_kind(config)

  def report(name, lower, needed, passes, rows, parts=1, train=False):
    work = Work(
      needed_flops=needed,
      kernel_flops=kernel_flops(model, passes, rows // parts, mesh),
      examples=rows * examples_per_row,
      tokens=rows * sum(one.layout for one in passes),
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
      found["advice"] = advise(found, config, arch, policy, mesh.shape)
    return found

  # The frequencies of directions, which weigh the loss, change no cost: none are counted.
  objective = None
  if bridge:
    of_bridge = loading.bridge_space(config) or space
    objective = bridge_objective(config, of_bridge, np.zeros((0, dimensions)), _STEPS)
  optimizer = make_optimizer(
    config.optimizer, _STEPS, bridge_learning_rate=config.bridge.learning_rate if bridge else 0.0
  )
  steps = make_steps(config, model, mesh, regions, optimizer, objective)
  rows = config.train.rows
  found = {
    "train": report(
      "train",
      lambda: steps.train.lower(steps.state, steps.frozen, steps.rows),
      flops.train_flops(
        arch,
        regions,
        rows,
        frozen=config.lora.rank > 0,
        online=reference == "online",
        bridge=bridge,
      ),
      [policy, personas] if bridge else [policy],
      rows,
      config.train.accumulation,
      train=True,
    )
  }
  graph, params = nnx.graphdef(model), param_shapes(model, mesh)

  def score(name, rows, bridge=None):
    program = score_program(graph, mesh, config.train.head_chunk)
    given = {"dimensions": dimensions, "given": True} if bridge else {}
    return report(
      name,
      lambda: program.lower(params, row_shapes(prompts, rows, mesh, **given)),
      flops.forward_flops(arch, prompts, rows, bridge),
      [policy if bridge else prompts],
      rows,
    )

  if reference == "cached":
    found["reference"] = score("reference", rows)
  rows = config.eval.rows
  # It is the same program as the reference's if it takes as many rows, and no bridge.
  same = not bridge and reference == "cached" and rows == config.train.rows
  found["evaluation"] = (
    found["reference"] | {"program": "evaluation"} if same else score("evaluation", rows, bridge)
  )
  if bridge:
    found["inference"] = report(
      "inference",
      lambda: infer_program(graph, mesh).lower(
        params, row_shapes(regions, rows, mesh, dimensions=dimensions)
      ),
      flops.infer_flops(arch, regions, rows, bridge),
      [personas],
      rows,
    )
  # A policy is scored while the base that it is compared with is kept.
  base = sum(
    math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(params)
  )
  for name in found.keys() & {"evaluation", "inference"}:
    found[name] = held_beside(found[name], "other_model", base)
  return found


def regions_of(config: Any) -> Regions:
  """The sizes of config.regions, or those proposed for its data, tokenizer and prompts."""
  if has_head(config) or not config.regions.layout:
    return loading.configured_regions(config)
  tokenizer = load_tokenizer(config.model.tokenizer or find_file(config.model.weights))
  return loading.make_formatting(config, tokenizer, prepared_space(config.data.path)).regions


def kernel_flops(
  model: Decoder, passes: Sequence[Regions], rows: int, mesh: Mesh
) -> dict[tuple[str, int], float]:
  """FLOPs of one call of each splash kernel on one device; none without splash attention.

  Kernels of passes over rows of several shapes are told apart by the keys that they take.
  Where two shapes have as many keys once padded, the mean is told: it adds up to what is
  executed, as each pass calls each kernel as often as the others do (but for a bridge that is
  trained alone: personas are not read backward then).

  Args:
    passes: the shapes of the rows that the decoder runs on.
    rows: of one part of a step, over all devices.
  """
  if model.attention != "splash":
    return {}
  shards = mesh.shape["context"]
  found = collections.defaultdict(list)
  for regions in passes:
    mask, sizes = plan(
      regions.layout,
      regions.response,
      shards=shards,
      block_q=model.block,
      block_kv=model.block,
    )
    one = flops.splash_flops(
      mask,
      sizes,
      rows=rows // meshes.row_shards(mesh),
      heads=model.arch.heads // mesh.shape["tensor"],
      head_width=model.arch.head_width,
      query_shards=shards,
    )
    for kernel, count in one.items():
      found[kernel, mask.keys].append(count)
  return {key: statistics.mean(counts) for key, counts in found.items()}
