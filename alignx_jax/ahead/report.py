"""What a compiled program will cost: memory, FLOPs, exchanges and time, as a dict and a table.

Memory is what the compiler allocates. Times are estimates from the published speed of a chip:

  FLOPs        executed FLOPs / peak FLOP/s
  HBM          bytes moved at least / HBM bandwidth
  ICI          for each exchange, bytes sent / the links its devices can use, added up
  DCN          bytes sent to other slices / the chip's share of its host's network
  cycles       the compiler's own estimate / clock; without exchanges and Pallas kernels

`estimated_step_seconds` is the largest of the first four: what a step takes at best, if they
all overlap. `estimated_step_seconds_serial` is the cycles, the kernels' FLOPs and the network
one after the other, as if nothing did. A run is to be expected between the two.
"""

import dataclasses
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from alignx_jax.ahead.chips import GIB, Topology
from alignx_jax.ahead.costs import COLLECTIVES, Collective, Costs, Kernel

ALIGNX_EXAMPLES = 1_311_622  # of the published training set


@dataclasses.dataclass(frozen=True)
class Work:
  """What a program does in one run, over all chips.

  Attributes:
    needed_flops: flops.train_flops, forward_flops or infer_flops.
    kernel_flops: executed by Pallas kernels on one chip, by a part of the kernel's name and its
      length; of one call (flops.splash_flops).
    examples, tokens: of one run; tokens with padding.
  """

  needed_flops: float
  kernel_flops: dict[tuple[str, int], float]
  examples: float
  tokens: int


def make_report(
  name: str, *, topology: Topology, devices: Sequence[Any], memory: Any, costs: Costs, work: Work
) -> dict:
  """All figures of a program as plain numbers, for JSON; those of time are estimates.

  Args:
    name: the program's.
    devices: of its mesh, in order (`mesh.devices.flat`).
    memory: `compiled.memory_analysis()`.
    costs: costs.program_costs of its text.
  Raises:
    ValueError: it calls a Pallas kernel whose FLOPs `work` does not tell.
  """
  chip, chips = topology.chip, topology.chips
  kernels = {kernel: _kernel_flops(kernel, work) for kernel in costs.kernels}
  kernel_flops = sum(count * kernels[kernel] for kernel, count in costs.kernels.items())
  executed = costs.flops + kernel_flops
  needed = work.needed_flops / chips
  bounds = {
    "flops": executed / chip.flops,
    "hbm": costs.hbm_bytes / chip.hbm_bandwidth,
    "ici": ici_seconds(costs.collectives, topology, devices),
    "dcn": costs.dcn_bytes / chip.dcn_bandwidth,
  }
  seconds = max(bounds.values())
  cycles = costs.cycles / chip.clock
  serial = cycles + kernel_flops / chip.flops + bounds["ici"] + bounds["dcn"]
  serial = max(serial, seconds)
  memory_gib = memory_kinds(memory)
  kinds = {kind: costs.of_kind(kind) for kind in COLLECTIVES}
  return {
    "program": name,
    "topology": topology.name,
    "slices": topology.slices,
    "chips": chips,
    "fits": memory_gib["total"] * GIB <= chip.hbm_bytes,
    "hbm_gib_per_chip": memory_gib["total"],
    "hbm_gib_available": chip.hbm_bytes / GIB,
    "memory_gib": memory_gib,
    "needed_flops_per_chip": needed,
    "executed_flops_per_chip": executed,
    "executed_over_needed_flops": executed / needed,
    "kernel_calls": {str(kernel): count for kernel, count in costs.kernels.items()},
    "collectives": {
      kind: {"count": count, "bytes": size, "bytes_sent": sent}
      for kind, (count, size, sent) in kinds.items()
      if count
    },
    "dcn_bytes_sent": costs.dcn_bytes,
    "estimated_seconds": bounds | {"cycles": cycles},
    "estimated_step_seconds": seconds,
    "estimated_step_seconds_serial": serial,
    "estimated_mfu": needed / (seconds * chip.flops),
    "estimated_mfu_serial": needed / (serial * chip.flops),
    "examples_per_step": work.examples,
    "tokens_per_step": work.tokens,
    "estimated_examples_per_second": work.examples / seconds,
    "estimated_tokens_per_second": work.tokens / seconds,
    "estimated_alignx_chip_hours": ALIGNX_EXAMPLES / work.examples * seconds * chips / 3600,
    "loops_of_unknown_length": list(costs.unknown_loops),
  }


def memory_kinds(memory: Any) -> dict[str, float]:
  """GiB on one chip by kind.

  `total` is what the compiler compares with the memory there is, the peak of all that lives
  at once, and the code. The kinds need not add up to it: outputs in donated arguments count
  once, and libtpu 0.0.42 counts some arguments among the temporaries again.
  """
  kinds = {
    "arguments": memory.argument_size_in_bytes,
    "outputs": memory.output_size_in_bytes,
    "outputs_in_donated_arguments": memory.alias_size_in_bytes,
    "temporaries": memory.temp_size_in_bytes,
    "code": memory.generated_code_size_in_bytes,
    "total": memory.peak_memory_in_bytes + memory.generated_code_size_in_bytes,
  }
  return {kind: size / GIB for kind, size in kinds.items()}


def held_beside(report: dict, what: str, size: int) -> dict:
  """The report of a program that runs while other arrays are kept on the chips too.

  Args:
    what: names them in the memory's kinds.
    size: their bytes on one chip.
  """
  if "memory_gib" not in report:  # it does not fit even alone
    return report
  memory = report["memory_gib"]
  memory = memory | {what: size / GIB, "total": memory["total"] + size / GIB}
  fits = memory["total"] <= report["hbm_gib_available"]
  return report | {"fits": fits, "hbm_gib_per_chip": memory["total"], "memory_gib": memory}


def out_of_memory_report(name: str, message: str, *, topology: Topology, work: Work) -> dict:
  """The report of a program that the compiler refused as too big.

  Args:
    message: the compiler's, "RESOURCE_EXHAUSTED: …".
  Raises:
    ValueError: the message is about something else.
  """
  needed = re.search(r"temporaries \(([\d.]+)([MGT])\)|Used ([\d.]+)([MGT]) of", message)
  if "RESOURCE_EXHAUSTED" not in message or not needed or not re.search("(?i)hbm", message):
    raise ValueError(f"{name} does not compile: {message}")
  number, unit = (group for group in needed.groups() if group)
  total = float(number) * {"M": 2**-10, "G": 1, "T": 2**10}[unit]
  return {
    "program": name,
    "topology": topology.name,
    "slices": topology.slices,
    "chips": topology.chips,
    "fits": False,
    "hbm_gib_per_chip": total,
    "hbm_gib_available": topology.chip.hbm_bytes / GIB,
    "compiler": message.strip().splitlines()[0],
    # Of a program that is not there.
    "executed_over_needed_flops": None,
    "estimated_step_seconds": None,
    "estimated_mfu": None,
    "examples_per_step": work.examples,
  }


def ici_seconds(
  collectives: Mapping[Collective, int], topology: Topology, devices: Sequence[Any]
) -> float:
  """Time that exchanges take at least, one after the other; only opposite permutes together.

  Args:
    collectives: how often each happens.
    devices: of the mesh, in order.
  """
  total, permutes = 0.0, Counter()
  for one, count in collectives.items():
    if one.kind == "collective-permute":
      permutes[one.groups] += count * one.size / topology.chip.link_bandwidth
    else:
      links = _links(one.groups, topology, devices)
      total += count * one.sent / (links * topology.chip.link_bandwidth)
  # What goes around a ring in halves goes both ways at once.
  while permutes:
    groups, seconds = permutes.popitem()
    back = {pair[::-1] for pair in groups}
    opposite = next((other for other in permutes if set(other) == back), None)
    total += max(seconds, permutes.pop(opposite, 0.0))
  return total


def _links(groups: Sequence[tuple], topology: Topology, devices: Sequence[Any]) -> int:
  """Links on which a device can send to its group at once, of the group that has least.

  A group reaches its members along each axis of the torus on which their coordinates
  differ: over two links an axis where they fill a ring, else one, the one at its end. That
  links are shared by groups, and that neighbours in a group may be some hops apart, is
  ignored.
  """
  least = topology.chip.links
  for group in groups:
    axes = zip(*(devices[member].coords for member in group), strict=True)
    used = [
      2 if wrap and size > 2 and len(set(places)) == size else 1
      for places, wrap, size in zip(axes, topology.wrap, topology.shape, strict=False)
      if len(set(places)) > 1
    ]
    least = min(least, sum(used) or least)
  return least


def _kernel_flops(kernel: Kernel, work: Work) -> float:
  """Of one call; the kernel is recognised by a part of its name, and by its length."""
  found = [
    flops
    for (part, length), flops in work.kernel_flops.items()
    if f"_{part}_" in f"{kernel.name}_" and length == kernel.length
  ]
  if len(found) != 1:
    known = ", ".join(f"{part}[{length}]" for part, length in work.kernel_flops) or "none"
    raise ValueError(f"The FLOPs of Pallas kernel '{kernel}' are not told; known are {known}.")
  return found[0]


# ------------------------------------------------------------------ for people


def table(report: dict) -> str:
  """The report as text, a screen high."""
  available, total = report["hbm_gib_available"], report["hbm_gib_per_chip"]
  spare = available - total
  slices = f"{report['slices']} × " if report["slices"] > 1 else ""
  lines = [f"{report['program']} on {slices}{report['topology']}, {report['chips']} chips"]
  verdict = f"fits, {spare:.2f} to spare" if report["fits"] else f"{-spare:.2f} too much"
  if "memory_gib" not in report:
    lines += [f"  memory of a chip, GiB: {total:.2f} of {available:.2f}: {verdict}"]
    return "\n".join(lines)
  lines += ["  memory of a chip, GiB"]
  for kind, size in report["memory_gib"].items():
    if kind != "total":
      lines += [f"    {kind.replace('_', ' '):<30} {size:8.2f}"]
  lines += [f"    {'most at one time':<30} {total:8.2f} of {available:.2f}: {verdict}"]
  lines += [
    "  FLOPs of a chip",
    f"    {'needed':<30} {report['needed_flops_per_chip']:8.3g}",
    f"    {'executed':<30} {report['executed_flops_per_chip']:8.3g}, "
    f"{report['executed_over_needed_flops']:.2f} times the needed",
  ]
  if report["collectives"]:
    lines += [f"  {'exchanges of a chip':<24} {'count':>7} {'GiB':>8} {'GiB sent':>9}"]
  for kind, sums in report["collectives"].items():
    lines += [
      f"    {kind:<22} {sums['count']:>7} {sums['bytes'] / GIB:8.2f} "
      f"{sums['bytes_sent'] / GIB:9.2f}"
    ]
  lines += ["  milliseconds of a step, estimated"]
  for bound, seconds in report["estimated_seconds"].items():
    if seconds:
      lines += [f"    {_BOUNDS[bound]:<44} {1000 * seconds:10.3f}"]
  best, serial = report["estimated_step_seconds"], report["estimated_step_seconds_serial"]
  lines += [
    f"    {'the largest bound, if all overlap':<44} {1000 * best:10.3f}",
    f"    {'cycles, kernels and network, if nothing does':<44} {1000 * serial:10.3f}",
    f"  MFU, estimated: {report['estimated_mfu_serial']:.1%} to {report['estimated_mfu']:.1%}",
    f"  {report['examples_per_step']:.0f} examples and {report['tokens_per_step']} tokens a step; "
    f"at best {report['estimated_examples_per_second']:.1f} examples and "
    f"{report['estimated_tokens_per_second']:.0f} tokens a second,",
    f"  {report['estimated_alignx_chip_hours']:.1f} chip-hours for the {ALIGNX_EXAMPLES:,} "
    "examples of AlignX",
  ]
  if report["loops_of_unknown_length"]:
    lines += ["  counted once: " + ", ".join(report["loops_of_unknown_length"])]
  return "\n".join(lines)


_BOUNDS = {
  "flops": "FLOPs at the peak",
  "hbm": "HBM bytes, each read and written once",
  "ici": "exchanges between chips (ICI)",
  "dcn": "exchanges between slices (DCN)",
  "cycles": "compiler's cycles, no network, no kernels",
}
