"""Programs compiled for TPUs that are not there, and what is told of them."""

import dataclasses
import json
import math
import os
import shlex
import subprocess
import sys
from collections import Counter
from types import SimpleNamespace

import jax
import pytest
from flax import nnx

from alignx_jax.ahead import flops, hlo
from alignx_jax.ahead.advice import advise, sizes
from alignx_jax.ahead.chips import CHIPS, GIB, Topology, parse_topology
from alignx_jax.ahead.costs import Collective, Costs, Kernel
from alignx_jax.ahead.report import (
  ALIGNX_EXAMPLES,
  Work,
  ici_seconds,
  make_report,
  out_of_memory_report,
  table,
)
from alignx_jax.data.rows import Regions
from alignx_jax.experiments.compiling import compile_programs, kernel_flops
from alignx_jax.models.decoder import Decoder
from alignx_jax.models.presets import get_architecture
from alignx_jax.training.mesh import make_mesh
from configs import base, ica_llama31_8b
from tests.pages import ROOT, shown_on_pages

pytestmark = pytest.mark.usefixtures("optimised")

os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")


def tiny(**mesh):
  config = base.get_config()
  config.model.preset = "tiny8"
  config.model.compute_dtype = "bfloat16"
  config.regions.context, config.regions.response, config.regions.examples = 256, 128, 4
  config.train.rows, config.train.accumulation, config.eval.rows = 8, 2, 8
  config.train.head_chunk = 32
  config.mesh.update(mesh)
  return config


def tiny_bridged(**mesh):
  config = tiny(**mesh)
  config.objective.name, config.bridge.kind, config.bridge.size = "pba", "head", 16
  # With 4 · 90 bridge tokens the policy's rows are 768 positions long, personas' are 384.
  config.regions.prompt, config.regions.persona, config.regions.parts = 152, 384, 16
  return config


def parameter_bytes(preset):
  model = nnx.eval_shape(lambda: Decoder(get_architecture(preset), rngs=nnx.Rngs(0)))
  return sum(4 * x.size for x in jax.tree.leaves(nnx.state(model)))


# ------------------------------------------------------------------ whole programs


@pytest.mark.slow
def test_the_command_prints_and_writes_what_the_three_programs_cost(tmp_path):
  changes = [
    "model.preset=tiny8",
    "model.compute_dtype=bfloat16",
    "regions.context=256",
    "regions.response=128",
    "regions.examples=4",
    "train.head_chunk=32",
    "eval.rows=4",
  ]
  command = [sys.executable, "-m", "alignx_jax.compile", "--config=configs/base.py"]
  command += [f"--workdir={tmp_path}", "--topology=v5e:2x2", "--save_text", "--examples_per_row=3"]
  command += [f"--config.{change}" for change in changes]
  done = subprocess.run(command, capture_output=True, text=True, timeout=240)
  assert done.returncode == 0, done.stderr
  for word in ("train on v5e:2x2", "reference on", "evaluation on", "to spare", "chip-hours"):
    assert word in done.stdout
  told = json.loads((tmp_path / "compile.json").read_text())
  assert told["fits"] is True
  assert told["examples_per_step"] == 8 * 3
  assert 0 < told["hbm_gib_per_chip"] < 1
  assert told["executed_over_needed_flops"] > 1
  assert 0 < told["estimated_step_seconds"] <= told["estimated_step_seconds_serial"]
  assert 0 < told["estimated_mfu"] < 1
  assert list(told["programs"]) == ["train", "reference", "evaluation"]
  assert told["programs"]["train"]["executed_flops_per_chip"] == told["executed_flops_per_chip"]
  # A policy is scored while its base is kept, both in float32 on four chips.
  size = Counter(told["programs"]["evaluation"]["memory_gib"])["other_model"] * GIB
  assert size == pytest.approx(parameter_bytes("tiny8") / 4, rel=0.05)
  text = (tmp_path / "train.hlo.txt").read_text()
  # Two rows on each chip; the logits of a whole response region are never there at once.
  arch = get_architecture("tiny8")
  assert hlo.has_shape(text, (2, 512, arch.width))
  assert not hlo.has_shape(text, (4, 128, arch.vocab_size))


@pytest.fixture(scope="module")
def whole():
  """Reports where rows alone are split."""
  return compile_programs(tiny(), parse_topology("v5e:2x2"))


@pytest.mark.slow
@pytest.mark.parametrize("mesh", [{"tensor": 2}, {"context": 2}])
def test_heads_and_positions_that_are_split_split_the_work(whole, mesh):
  reports = compile_programs(tiny(**mesh), parse_topology("v5e:2x2"))
  assert reports["train"]["needed_flops_per_chip"] == whole["train"]["needed_flops_per_chip"]
  ratio = reports["train"]["executed_flops_per_chip"] / whole["train"]["executed_flops_per_chip"]
  assert 0.7 < ratio < 1.5
  assert sum(reports["train"]["kernel_calls"].values()) >= 3 * get_architecture("tiny8").layers


@pytest.mark.slow
@pytest.mark.parametrize("mesh", [{}, {"tensor": 2}, {"context": 2}])
def test_a_learned_bridge_infers_and_is_read(mesh):
  reports = compile_programs(tiny_bridged(**mesh), parse_topology("v5e:2x2"))
  assert list(reports) == ["train", "reference", "evaluation", "inference"]
  arch, regions = get_architecture("tiny8"), Regions(152, 128, 4, persona=384, parts=16)
  bridge = flops.BridgeSizes(dimensions=90, size=16)
  needed = {
    "train": flops.train_flops(arch, regions, 8, bridge=bridge),
    "reference": flops.forward_flops(arch, regions, 8),
    "evaluation": flops.forward_flops(arch, regions, 8, bridge),
    "inference": flops.infer_flops(arch, regions, 8, bridge),
  }
  calls = arch.layers
  for name, lengths in {
    "train": {768: 2 * 3 * calls, 384: 2 * 3 * calls},  # of two parts; forward, dq, dkv
    "reference": {512: calls},  # 408 in whole blocks
    "evaluation": {768: calls},
    "inference": {384: calls},
  }.items():
    report = reports[name]
    assert report["fits"]
    assert report["needed_flops_per_chip"] * 4 == needed[name]
    found = Counter()
    for kernel, count in report["kernel_calls"].items():
      found[int(kernel.rstrip("]").rpartition("[")[2])] += count
    assert found == lengths
    assert 1 < report["executed_over_needed_flops"] < 4  # of which much is blocks' empty halves
  assert "other_model" in reports["inference"]["memory_gib"]


@pytest.mark.slow
def test_a_bridge_that_is_trained_alone_needs_no_gradients_of_what_it_reads():
  config = tiny_bridged()
  config.bridge.alone = True
  train = compile_programs(config, parse_topology("v5e:2x2"))["train"]
  assert train["executed_over_needed_flops"] > 1
  backward = [kernel for kernel in train["kernel_calls"] if "_dq_" in kernel]
  assert backward == ["splash_mha_dq_segmented_no_residuals[768]"]  # not of personas, 384 long


@pytest.mark.slow
def test_slices_exchange_gradients_over_the_data_centre_network():
  config = tiny(replica=2)
  config.train.rows = 16
  reports = compile_programs(config, parse_topology("v5e:2x2", slices=2))
  assert reports["train"]["chips"] == 8
  assert reports["train"]["dcn_bytes_sent"] > 0
  assert reports["reference"]["dcn_bytes_sent"] < reports["train"]["dcn_bytes_sent"]
  assert "2 × v5e:2x2" in table(reports["train"])


@pytest.mark.slow
def test_what_is_too_big_is_told_with_what_would_help():
  config = tiny()
  config.train.rows, config.train.accumulation = 32768, 1
  reports = compile_programs(config, parse_topology("v5e:2x2"))
  train = reports["train"]
  assert not train["fits"] and train["hbm_gib_per_chip"] > 15.75
  assert "too much" in table(train)
  parts = train["advice"][0]["change"]["config.train.accumulation"]
  assert parts > 1 and train["advice"][0]["saves_gib"] > 1
  config.train.accumulation = parts
  fewer = compile_programs(config, parse_topology("v5e:2x2"))["train"]
  assert fewer["hbm_gib_per_chip"] < train["hbm_gib_per_chip"]


def test_mistakes_are_one_sentence(tmp_path):
  command = [sys.executable, "-m", "alignx_jax.compile", "--config=configs/base.py"]
  command += [f"--workdir={tmp_path}", "--topology=v9:2x2"]
  done = subprocess.run(command, capture_output=True, text=True, timeout=120)
  assert done.returncode == 1
  assert done.stderr.strip().splitlines()[-1].startswith("Error: No chip 'v9'")


# ------------------------------------------------------------------ the report's arithmetic

CHIP = CHIPS["v5e"]
DEVICES = [SimpleNamespace(coords=[i % 4, i // 4, 0]) for i in range(16)]
TOPOLOGY = Topology("v5e:4x4", CHIP, (4, 4), (False, False), 1, tuple(DEVICES))


def memory(arguments=1, temporaries=2, peak=3):
  sizes = {"argument": arguments, "output": 1, "alias": 1, "temp": temporaries}
  sizes = {f"{kind}_size_in_bytes": size * GIB for kind, size in sizes.items()}
  return SimpleNamespace(
    **sizes, generated_code_size_in_bytes=GIB // 2, peak_memory_in_bytes=peak * GIB
  )


def report(costs, *, kernels=None, needed=16 * 197e12 / 4, **sizes):
  return make_report(
    "train",
    topology=TOPOLOGY,
    devices=DEVICES,
    memory=memory(**sizes),
    costs=costs,
    work=Work(needed, kernels or {}, examples=100, tokens=4000),
  )


def test_the_largest_bound_is_the_step():
  costs = Costs(flops=197e12 / 2, cycles=1.5e9, hbm_bytes=819e9 / 4, dcn_bytes=3.125e9 / 10)
  found = report(costs)
  assert found["estimated_seconds"] == pytest.approx(
    {"flops": 0.5, "hbm": 0.25, "ici": 0, "dcn": 0.1, "cycles": 1.0}
  )
  assert found["estimated_step_seconds"] == pytest.approx(0.5)
  assert found["estimated_step_seconds_serial"] == pytest.approx(1.1)
  assert found["executed_over_needed_flops"] == pytest.approx(2)
  assert found["estimated_mfu"] == pytest.approx(0.5)
  assert found["estimated_examples_per_second"] == pytest.approx(200)
  hours = ALIGNX_EXAMPLES / 200 * 16 / 3600
  assert found["estimated_alignx_chip_hours"] == pytest.approx(hours)
  json.dumps(found)  # plain numbers
  assert f"{hours:.1f} chip-hours" in table(found)


def test_kernels_add_their_flops_and_unknown_ones_are_refused():
  dq, fwd, long = (
    Kernel("splash_mha_dq_segmented", 512),
    Kernel("splash_mha_fwd", 512),
    Kernel("splash_mha_fwd", 1024),
  )
  costs = Costs(flops=1e12, kernels=Counter({dq: 3, fwd: 2, long: 5}))
  told = {("fwd", 512): 1e12, ("fwd", 1024): 4e12, ("dq", 512): 2e12, ("dkv", 512): 5e12}
  found = report(costs, kernels=told)
  assert found["executed_flops_per_chip"] == 1e12 + 3 * 2e12 + 2 * 1e12 + 5 * 4e12
  assert found["kernel_calls"]["splash_mha_fwd[1024]"] == 5
  with pytest.raises(ValueError, match=r"'splash_mha_dq_segmented\[512\]' are not told"):
    report(costs, kernels={key: value for key, value in told.items() if key[0] == "fwd"})


def test_rows_of_two_shapes_with_as_many_keys_are_told_by_their_mean():
  model = Decoder(get_architecture("tiny8"), rngs=nnx.Rngs(0), attention="splash", block=256)
  mesh = make_mesh(None, jax.devices()[:1])
  causal, packed = Regions(1024, 0, 4), Regions(512, 256, 4)
  short, sums = Regions(512, 0, 4), Counter()
  for passes in ([causal], [packed]):
    sums.update(kernel_flops(model, passes, 2, mesh))
  assert sums["fwd", 1024] > 0
  both = kernel_flops(model, [causal, packed, short], 2, mesh)
  assert {key: 2 * count for key, count in both.items() if key[1] == 1024} == sums
  apart = kernel_flops(model, [short], 2, mesh)
  assert {key: count for key, count in both.items() if key[1] == 512} == apart


def test_memory_is_the_peak_and_the_code():
  assert report(Costs(flops=1))["hbm_gib_per_chip"] == 3.5
  assert report(Costs(flops=1))["fits"]
  assert not report(Costs(flops=1), peak=15.5)["fits"]
  assert "0.25 too much" in table(report(Costs(flops=1), peak=15.5))


def test_links_that_a_group_can_use_decide_how_long_its_exchange_takes():
  def seconds(topology, devices, groups, kind="all-gather", size=1e9):
    return ici_seconds({Collective(kind, int(size), groups): 1}, topology, devices)

  row, column = ((0, 1, 2, 3),), ((0, 4, 8, 12),)
  # A line of four: three quarters through the one link at its end.
  assert seconds(TOPOLOGY, DEVICES, row) == pytest.approx(0.75 / 50)
  assert seconds(TOPOLOGY, DEVICES, column, "all-reduce") == pytest.approx(1.5 / 50)
  # Both axes of the grid.
  assert seconds(TOPOLOGY, DEVICES, (tuple(range(16)),)) == pytest.approx(15 / 16 / 100)
  pairs = ((0, 1), (1, 0))
  assert seconds(TOPOLOGY, DEVICES, pairs, "collective-permute") == pytest.approx(1 / 50)
  ring = [SimpleNamespace(coords=[i, 0, 0]) for i in range(16)]
  topology = dataclasses.replace(TOPOLOGY, shape=(16, 16), wrap=(True, True))
  assert seconds(topology, ring, (tuple(range(16)),)) == pytest.approx(15 / 16 / 100)


def test_permutes_in_opposite_directions_share_no_link():
  around = tuple((i, (i + 1) % 4) for i in range(4))
  back = tuple(pair[::-1] for pair in around)
  moves = [Collective("collective-permute", 10**9, groups) for groups in (around, back)]
  one_way = ici_seconds({moves[0]: 3}, TOPOLOGY, DEVICES)
  assert one_way == pytest.approx(3 / 50)
  assert ici_seconds({moves[0]: 3, moves[1]: 3}, TOPOLOGY, DEVICES) == pytest.approx(one_way)
  assert ici_seconds({moves[0]: 3, moves[1]: 4}, TOPOLOGY, DEVICES) == pytest.approx(4 / 50)


def test_a_refusal_by_the_compiler_is_read_or_passed_on():
  work = Work(1e12, {}, examples=100, tokens=4000)
  message = (
    "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries "
    "(50.28G) exceeds available HBM (15.75G)."
  )
  found = out_of_memory_report("train", message, topology=TOPOLOGY, work=work)
  assert (found["fits"], found["hbm_gib_per_chip"]) == (False, 50.28)
  assert found["examples_per_step"] == 100 and found["estimated_mfu"] is None
  for other in ("INTERNAL: no", "RESOURCE_EXHAUSTED: Ran out of memory in memory space vmem"):
    with pytest.raises(ValueError, match=other):
      out_of_memory_report("train", other, topology=TOPOLOGY, work=work)


# ------------------------------------------------------------------ advice


def advice(mesh, **fields):
  config = base.get_config()
  config.model.compute_dtype = "bfloat16"
  config.train.rows = 64
  config.update_from_flattened_dict(fields)
  refused = {"fits": False, "chips": 64, "hbm_gib_per_chip": 20.0, "hbm_gib_available": 15.75}
  shape = {"replica": 1, "fsdp": 64, "tensor": 1, "context": 1} | mesh
  arch = get_architecture("llama31_8b")
  found = advise(refused, config, arch, Regions(6144, 1024, 16), shape)
  return {tuple(item["change"]): item["saves_gib"] for item in found}


def test_what_fits_needs_no_advice():
  config, arch = base.get_config(), get_architecture("tiny8")
  assert advise({"fits": True}, config, arch, Regions(1, 1, 1), {}) == []


def test_a_persona_region_adds_to_what_layers_keep_and_not_to_the_widest_layer():
  config, arch = base.get_config(), get_architecture("llama31_8b")
  mesh = {"replica": 1, "fsdp": 64, "tensor": 1, "context": 1}
  plain = sizes(config, arch, Regions(1024, 512, 8), mesh)
  bridged = sizes(config, arch, Regions(1024, 512, 8, persona=4096, parts=64), mesh)
  assert bridged.residuals == 3 * plain.residuals and bridged.layer == 2 * plain.layer


def test_rows_are_taken_in_parts_while_there_are_several():
  several, one = advice({}, **{"train.rows": 256}), advice({})
  assert ("config.train.accumulation",) in several
  assert ("config.train.accumulation",) not in one
  split = ("config.mesh.fsdp", "config.train.accumulation", "config.mesh.context")
  assert split in one and split not in several
  # The residual stream of 32 layers, a row of 8,192 positions of 4,096 in two bytes: 2 GiB.
  assert 1 < one[split] < 2


def test_the_sizes_named_are_those_of_the_model():
  found = advice({}, **{"model.remat": False})
  # 31 layers keep about 1 GiB each.
  assert found[("config.model.remat",)] == max(found.values()) > 15
  # 8.03e9 parameters over 64 chips, two bytes less each.
  assert found[("config.model.param_dtype",)] == pytest.approx(8.03e9 / 64 * 2 / GIB, rel=0.02)
  # Parameters, two moments and a gradient of four bytes.
  assert found[("chips",)] == pytest.approx(8.03e9 / 64 * 16 / GIB / 2, rel=0.02)


# ------------------------------------------------------------------ the real thing


@pytest.mark.slow
def test_the_pages_program_fits_and_holds_neither_whole_parameters_nor_whole_logits(tmp_path):
  (command,) = shown_on_pages(r"alignx_jax\.compile ")
  arguments = [*shlex.split(command.replace("runs/compile", str(tmp_path))), "--save_text"]
  done = subprocess.run(arguments, cwd=ROOT, capture_output=True, text=True, timeout=900)
  assert done.returncode == 0, done.stderr[-3000:]
  assert "of 15.75: fits" in done.stdout
  train = json.loads((tmp_path / "compile.json").read_text())
  config = ica_llama31_8b.get_config()
  assert train["fits"] and train["executed_over_needed_flops"] <= 1.4
  assert train["examples_per_step"] == 128
  arch = get_architecture(config.model.preset)
  D, F, V, L = arch.width, arch.feed_forward, arch.vocab_size, arch.layers
  H, K, A = arch.heads, arch.kv_heads, arch.head_width
  matrices = [(D, H * A), (D, K * A), (D, F), (V, D)]
  heads = [(D, H, A), (D, K, A), (H, A, D)]
  matrices += [shape[::-1] for shape in matrices]
  whole = {*matrices, *heads, *((L, *shape) for shape in (*matrices, *heads))}
  positions = 2 * config.regions.response  # of one row, on a device that holds half of V
  logits = lambda shape: V // 2 in shape and D not in shape and math.prod(shape) // (V // 2)
  assert logits((2, 1024, V // 2)) == positions
  for name in ("train", "reference"):
    text = (tmp_path / f"{name}.hlo.txt").read_text()
    shapes = {tuple(n for n in a.shape if n > 1) for a, _ in hlo.stored_arrays(text)}
    assert len(shapes) > 50
    assert not shapes & whole
    assert not any(logits(shape) >= positions for shape in shapes)
    # A chunk of them is there: the test looks where logits are.
    assert any(logits(shape) for shape in shapes)
