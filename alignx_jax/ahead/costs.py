"""What one run of a compiled program costs on one chip, added up from its text.

XLA's own `cost_analysis()` counts the body of a loop once. Here every loop counts as often
as it runs, and what the compiler splits or wraps is counted as what it stands for: a matrix
product is a convolution inside a fusion; a reduce-scatter is a fusion named
all-reduce-scatter; an asynchronous all-gather stands in the fusion that starts it, in those
that it runs beside, and in the one that waits for it, and is counted where it starts.
"""

import dataclasses
import math
import re
from collections import Counter
from typing import NamedTuple

import numpy as np

from alignx_jax.ahead.hlo import (
  Computation,
  Instruction,
  Program,
  evaluate,
  next_state,
  parse,
  trip_count,
)

COLLECTIVES = (
  "all-gather",
  "all-reduce",
  "reduce-scatter",
  "all-to-all",
  "collective-permute",
  "collective-broadcast",
  "ragged-all-to-all",
)


@dataclasses.dataclass(frozen=True)
class Collective:
  """An exchange between the chips of a slice.

  Attributes:
    kind: one of COLLECTIVES.
    size: bytes of the whole array on one chip: what an all-gather gives, what the others take.
    groups: the devices that exchange, as places in the mesh of one slice; (from, to) pairs for a
      collective-permute.
  """

  kind: str
  size: int
  groups: tuple[tuple[int, ...], ...]

  @property
  def sent(self) -> float:
    """Bytes that one chip must send, by the algorithm that sends least."""
    members = max(map(len, self.groups), default=1)
    share = (members - 1) / members
    match self.kind:
      case "all-reduce":
        return 2 * share * self.size
      case "collective-permute" | "collective-broadcast":
        return self.size
      case _:
        return share * self.size


class Kernel(NamedTuple):
  """A Pallas kernel as a program calls it: one of attention runs on rows of several shapes.

  Attributes:
    length: of the longest axis of what it takes; of attention, the keys with their padding.
  """

  name: str
  length: int

  def __str__(self) -> str:
    return f"{self.name}[{self.length}]"


@dataclasses.dataclass
class Costs:
  """Of one run on one chip.

  Attributes:
    flops: of dot products and convolutions; a multiplication and an addition are two. Pallas
      kernels count none.
    cycles: the compiler's estimate, without collectives and Pallas kernels, which have none.
    hbm_bytes: moved between HBM and the chip if each operation reads what it needs once and
      writes its result once: the least. Padding of tiles is moved, arrays in VMEM are not.
    dcn_bytes: sent to other slices.
    collectives: how often each exchange happens.
    kernels: how often each Pallas kernel is called.
    unknown_loops: loops whose length is known at run time only, counted once.
  """

  flops: float = 0
  cycles: float = 0
  hbm_bytes: float = 0
  dcn_bytes: float = 0
  collectives: Counter[Collective] = dataclasses.field(default_factory=Counter)
  kernels: Counter[Kernel] = dataclasses.field(default_factory=Counter)
  unknown_loops: tuple[str, ...] = ()

  def add(self, other: "Costs", times: int = 1) -> None:
    self.flops += times * other.flops
    self.cycles += times * other.cycles
    self.hbm_bytes += times * other.hbm_bytes
    self.dcn_bytes += times * other.dcn_bytes
    for mine, others in ((self.collectives, other.collectives), (self.kernels, other.kernels)):
      for key, count in others.items():
        mine[key] += times * count
    self.unknown_loops += other.unknown_loops

  def of_kind(self, kind: str) -> tuple[int, int, float]:
    """How many collectives of a kind there are, their bytes, and bytes that a chip sends."""
    found = [(one, count) for one, count in self.collectives.items() if one.kind == kind]
    return (
      sum(count for _, count in found),
      sum(count * one.size for one, count in found),
      sum(count * one.sent for one, count in found),
    )


def program_costs(text: str) -> Costs:
  """The costs of `compiled.as_text()`.

  Raises:
    ValueError: it is not the text of a compiled program, or groups devices in a way not known.
  """
  program = parse(text)
  return _scheduled(program, program.computations[program.entry], [])


def _scheduled(program: Program, computation: Computation, parameters: list) -> Costs:
  """Costs of a computation that runs instruction by instruction.

  Args:
    parameters: what is known of their values; lengths of inner loops may depend on it.
  """
  total = Costs()
  for instruction in computation.values():
    opcode = instruction.opcode
    if opcode == "while":
      total.add(_loop(program, computation, instruction, parameters))
    elif opcode == "conditional":
      branches = [
        _scheduled(program, program.computations[name], []) for name in instruction.called
      ]
      total.add(max(branches, key=lambda costs: (costs.flops, costs.hbm_bytes)))
    elif opcode in ("call", "async-start"):
      for name in instruction.called:
        total.add(_scheduled(program, program.computations[name], []))
    elif opcode not in ("async-update", "async-done"):
      total.add(_instruction(program, computation, instruction))
  return total


def _loop(program: Program, outer: Computation, loop: Instruction, parameters: list) -> Costs:
  """Costs of a `while` over all its turns."""
  start = evaluate(program, outer, loop.operands[0], parameters)
  body = program.computations[loop.attribute("body")]
  trips = trip_count(program, loop, start)
  same = None
  if isinstance(start, list) and body[body.root].opcode == "tuple":
    second = next_state(program, body, start)
    third = next_state(program, body, second)
    states = zip(start, second, third, strict=True)
    same = [a if a == b == c else None for a, b, c in states]
  total = Costs()
  for name in ("body", "condition"):
    part = _scheduled(program, program.computations[loop.attribute(name)], [same])
    total.add(part, 1 if trips is None else trips)
  if trips is None:
    total.unknown_loops += (loop.source or loop.name,)
  return total


def _instruction(program: Program, computation: Computation, instruction: Instruction) -> Costs:
  """Costs of one scheduled instruction."""
  costs = Costs(hbm_bytes=_hbm_bytes(program, computation, instruction))
  costs.cycles = instruction.number("estimated_cycles") or 0
  if instruction.opcode == "fusion":
    inner = _fused(program, program.computations[instruction.attribute("calls")])
    costs.flops, costs.collectives = inner.flops, inner.collectives
  elif instruction.opcode == "send" and "is_host_transfer=true" in instruction.rest:
    costs.dcn_bytes = instruction.arrays[0].size
  else:
    costs.add(_math(program, computation, instruction))
  return costs


def _fused(program: Program, computation: Computation) -> Costs:
  """FLOPs and collectives of a computation that a fusion calls."""
  total = Costs()
  for instruction in computation.values():
    if instruction.opcode == "fusion":
      total.add(_fused(program, program.computations[instruction.attribute("calls")]))
    else:
      total.add(_math(program, computation, instruction))
  return total


def _math(program: Program, computation: Computation, instruction: Instruction) -> Costs:
  """FLOPs, collectives and kernels of one instruction, wherever it stands."""
  costs = Costs()
  kind = instruction.opcode.removesuffix("-start")
  if instruction.opcode == "convolution":
    costs.flops = _convolution_flops(computation, instruction)
  elif instruction.opcode == "dot":
    axes = _numbers(re.search(r"lhs_contracting_dims=\{([\d,]*)\}", instruction.rest)[1])
    shape = computation[instruction.operands[0]].arrays[0].shape
    contracted = math.prod(shape[axis] for axis in axes)
    costs.flops = 2 * contracted * math.prod(instruction.arrays[0].shape)
  elif kind in COLLECTIVES and not _in_flight(instruction):
    groups = _groups(instruction, program.partitions)
    size = sum(
      array.size for operand in instruction.operands for array in computation[operand].arrays
    )
    if kind == "all-gather":
      size *= max(map(len, groups), default=1)
    if computation.name.startswith("all-reduce-scatter"):
      kind = "reduce-scatter"
    costs.collectives[Collective(kind, size, groups)] += 1
  elif 'custom_call_target="tpu_custom_call"' in instruction.rest:
    source = re.search(r"([^/]+)/pallas_call", instruction.source)
    name = source[1] if source else instruction.name.rpartition(".")[0]
    arrays = (array for operand in instruction.operands for array in computation[operand].arrays)
    length = max((size for array in arrays for size in array.shape), default=1)
    costs.kernels[Kernel(name, length)] += 1
  return costs


def _in_flight(instruction: Instruction) -> bool:
  """Whether this is a collective that another fusion has started."""
  return bool(re.search(r'"flag_start":"\d', instruction.rest))


# ------------------------------------------------------------------ FLOPs


def _convolution_flops(computation: Computation, instruction: Instruction) -> int:
  """Two for each product of an input and a kernel element that is not padding.

  On TPU a batched matrix product is a convolution whose batch axes are spatial ones, with
  a window and dilation such that most positions fall on holes; those are not counted.
  """
  image, kernel = (computation[operand].arrays[0].shape for operand in instruction.operands)
  labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", instruction.rest)
  of_image, of_kernel, of_result = labels[1], labels[2], labels[3]
  result = instruction.arrays[0].shape
  products = (
    image[of_image.index("b")]
    // (instruction.number("batch_group_count") or 1)
    * (image[of_image.index("f")] // (instruction.number("feature_group_count") or 1))
    * result[of_result.index("f")]
  )
  window = re.search(r"window=\{([^}]*)\}", instruction.rest)
  window = dict(item.split("=") for item in window[1].split()) if window else {}

  def per_axis(name, axis, default):
    return window[name].split("x")[axis] if name in window else default

  for axis in range(len(of_image) - 2):
    size = image[of_image.index(str(axis))]
    stride, spread, hole = (
      int(per_axis(name, axis, 1)) for name in ("stride", "rhs_dilate", "lhs_dilate")
    )
    before = int(per_axis("pad", axis, "0_0").split("_")[0])
    taps = np.arange(kernel[of_kernel.index(str(axis))]) * spread - before
    places = taps + np.arange(result[of_result.index(str(axis))])[:, None] * stride
    inside = (places >= 0) & (places < (size - 1) * hole + 1) & (places % hole == 0)
    products *= int(inside.sum())
  return 2 * products


# ------------------------------------------------------------------ bytes


# What moves nothing itself: names, constants, and ends of what is counted at its start.
_FREE = {
  "parameter",
  "constant",
  "tuple",
  "get-tuple-element",
  "bitcast",
  "after-all",
  "partition-id",
  "replica-id",
  "opt-barrier",
  "copy-done",
  "slice-done",
  "dynamic-slice-done",
  "dynamic-update-slice-done",
  "send-done",
  "recv",
  "recv-done",
  *(f"{kind}-done" for kind in COLLECTIVES),
}
_PARTS = {"slice", "dynamic-slice", "gather"}  # read what they give of their first operand


def _hbm_bytes(program: Program, computation: Computation, instruction: Instruction) -> int:
  """Bytes that a scheduled instruction moves from and to HBM."""
  opcode = instruction.opcode
  operands = [computation[operand].arrays for operand in instruction.operands]
  flat = [array for arrays in operands for array in arrays]
  if opcode in _FREE or re.search(r'target="(AllocateBuffer|ConcatBitcast)"', instruction.rest):
    return 0
  if opcode == "fusion":
    inner = program.computations[instruction.attribute("calls")]
    read = sum(
      _read(program, inner, inner.parameters[i])
      for i, arrays in enumerate(operands)
      if arrays[0].hbm
    )
    results = inner[inner.root].operands if inner[inner.root].opcode == "tuple" else [inner.root]
    if len(results) != len(instruction.arrays):  # a start or an end of a collective
      return read + sum(array.hbm for array in instruction.arrays[1:])
    return read + sum(
      _written(program, inner, result)
      for result, array in zip(results, instruction.arrays, strict=True)
      if array.hbm
    )
  if opcode in ("slice-start", "dynamic-slice-start"):
    moved = instruction.arrays[-2]  # then comes the DMA's flag
    return moved.laid_out * (bool(flat[0].hbm) + bool(moved.hbm))
  if opcode in _PARTS:
    part = instruction.arrays[0]
    return part.laid_out * (bool(flat[0].hbm) + bool(part.hbm))
  if opcode == "dynamic-update-slice":
    return flat[1].hbm + (flat[1].laid_out if instruction.arrays[0].hbm else 0)
  if opcode == "copy-start":
    return sum(array.hbm for array in instruction.arrays[:2])
  if opcode == "send":
    return flat[0].hbm
  results = instruction.arrays
  if opcode.endswith("-start"):  # the results stand behind the operands, or alone
    results = results[len(flat) : 2 * len(flat)] or results
  return sum(array.hbm for array in (*flat, *results))


def _read(program: Program, computation: Computation, name: str) -> int:
  """Bytes of a value that a fused computation needs: less than all if it takes slices."""
  whole, total = computation[name].arrays[0].laid_out, 0
  for user, place in computation.users.get(name, []):
    if user.opcode == "bitcast":
      total += _read(program, computation, user.name)
    elif user.opcode == "fusion":
      inner = program.computations[user.attribute("calls")]
      total += _read(program, inner, inner.parameters[place])
    elif user.opcode in _PARTS and place == 0:
      total += user.arrays[0].laid_out
    elif not (
      (user.opcode == "dynamic-update-slice" and place == 0)  # changed where it lies
      or user.opcode == "tuple"  # passed on
      or _passes(user)
    ):
      return whole
  return min(whole, total)


def _written(program: Program, computation: Computation, name: str) -> int:
  """Bytes that a fused computation writes of a result: of an update in place, the update."""
  instruction = computation[name]
  if instruction.opcode == "parameter" or _passes(instruction):
    return 0
  if instruction.opcode == "bitcast":
    return _written(program, computation, instruction.operands[0])
  if instruction.opcode == "dynamic-update-slice":
    target, update = (computation[operand] for operand in instruction.operands[:2])
    while target.opcode in ("bitcast", "dynamic-update-slice"):
      target = computation[target.operands[0]]
    if target.opcode == "parameter":
      return update.arrays[0].laid_out
  return instruction.arrays[0].laid_out


def _passes(instruction: Instruction) -> bool:
  """Whether it is a collective under way, or the wait for one."""
  kind = instruction.opcode.removesuffix("-start")
  waits = 'custom_call_target="AsyncCollectiveDone"' in instruction.rest
  return waits or (kind in COLLECTIVES and _in_flight(instruction))


# ------------------------------------------------------------------ groups of devices


def _groups(instruction: Instruction, devices: int) -> tuple[tuple[int, ...], ...]:
  """The devices that exchange with each other.

  XLA writes groups as lists, as a reshaped and transposed range, or as axes of a mesh.
  """
  listed = re.search(
    r"(?:replica_groups|source_target_pairs)=\{((?:\{[\d,]*\},?)*)\}", instruction.rest
  )
  if listed:
    groups = re.findall(r"\{([\d,]+)\}", listed[1])
    return tuple(tuple(_numbers(group)) for group in groups) or (tuple(range(devices)),)
  ranged = re.search(rf"replica_groups=\[([\d,]+)\]<={_RANGE}", instruction.rest)
  if ranged:
    return _tuples(_range(*ranged.groups()[1:]).reshape(_numbers(ranged[1])))
  meshed = re.search(
    rf"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\({_RANGE}\))? \{{([^}}]*)\}}",
    instruction.rest,
  )
  if meshed:
    mesh, shape, order, axes = meshed.groups()
    return _mesh_groups(mesh, axes, _range(shape, order) if shape else None)
  found = re.search(r"replica_groups=.{0,60}", instruction.rest)
  raise ValueError(f"No known way to group devices: {found[0] if found else instruction.rest!r}.")


# A range of devices, reshaped and transposed: "[2,4]T(1,0)".
_RANGE = r"\[([\d,]+)\](?:T\(([\d,]+)\))?"


def _range(shape: str, order: str | None) -> np.ndarray:
  array = np.arange(math.prod(_numbers(shape))).reshape(_numbers(shape))
  return array.transpose(_numbers(order)) if order else array


def _mesh_groups(mesh: str, axes: str, devices: np.ndarray | None) -> tuple[tuple[int, ...], ...]:
  """Groups along axes of a mesh.

  Args:
    mesh: "'a'=2,'b'=8".
    axes: "'b'", or "'b':(2)4" for the 4 of 2 · 4 · 1.
    devices: in the order of the mesh; None for 0, 1, ….
  """
  sizes = {name: int(size) for name, size in re.findall(r"'?([\w.\-]+)'?=(\d+)", mesh)}
  used = {}
  for name, before, size in re.findall(r"'?([\w.\-]+)'?(?::\((\d+)\)(\d+))?", axes):
    used[name] = (int(before), int(size)) if size else (1, sizes[name])
  shape, grouped = [], []
  for name, size in sizes.items():
    before, part = used.get(name, (1, 1))
    grouped.append(len(shape) + 1)
    shape += [before, part, size // (before * part)]
  devices = np.arange(math.prod(shape)) if devices is None else devices
  apart = [axis for axis in range(len(shape)) if axis not in grouped]
  members = math.prod(shape[axis] for axis in grouped)
  return _tuples(devices.reshape(shape).transpose(apart + grouped).reshape(-1, members))


def _tuples(groups: np.ndarray) -> tuple[tuple[int, ...], ...]:
  return tuple(map(tuple, groups.tolist()))


def _numbers(text: str) -> list[int]:
  return [int(number) for number in text.split(",") if number]
