"""The text of a compiled program as computations, instructions and arrays.

`compiled.as_text()` is all that XLA shows of a scheduled program. One line is one
instruction:

    %name = bf16[8,128]{1,0:T(8,128)(2,1)S(1)} fusion(%a, %b), kind=kLoop, calls=%inner, …

type, shape, and in braces the layout: axes from minor to major, the tiles that memory is
padded to, and the memory space (none: HBM; S(1): the chip's fast VMEM). A computation that a
fusion calls runs without storing its intermediate arrays; all others are scheduled: each of
their instructions stores what it computes.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Iterator

_ARRAY = re.compile(r"\b([a-z][a-z0-9]*)\[([\d,<=]*)\](?:\{([^}]*)\})?")
_START = re.compile(r"\s+(ROOT )?%?([\w.\-]+) = (?=\S)")
_HEADER = re.compile(r"(ENTRY )?%?([\w.\-]+) \(.*\{\s*$")
_OPCODE = re.compile(r"\s*([a-z][\w\-]*)\(")
_NAME = re.compile(r"%([\w.\-]+)")
MAX_TRIPS = 100_000  # a counter that runs longer is not followed


@dataclasses.dataclass(frozen=True)
class Array:
  """Type, shape and layout of a value.

  Attributes:
    layout: what stands in braces, "1,0:T(8,128)"; empty for none.
  """

  dtype: str
  shape: tuple[int, ...]
  layout: str = ""

  def __str__(self) -> str:
    return f"{self.dtype}[{','.join(map(str, self.shape))}]"

  @property
  def bits(self) -> int:
    """Of one element; 0 for a token."""
    size = re.search(r"\d+", self.dtype)
    return int(size[0]) if size else 8 * (self.dtype == "pred")

  @property
  def size(self) -> int:
    """Bytes of its elements."""
    return math.prod(self.shape) * self.bits // 8

  @functools.cached_property
  def laid_out(self) -> int:
    """Bytes in memory, with the padding of its tiles."""
    order, _, rest = self.layout.partition(":")
    tile = re.search(r"T\(([\d,]+)\)", rest)
    minor_first = [self.shape[int(axis)] for axis in order.split(",") if axis]
    if not tile or len(minor_first) != len(self.shape):
      return self.size
    tile = [int(size) for size in reversed(tile[1].split(","))]
    minor_first += [1] * (len(tile) - len(minor_first))
    tile += [1] * (len(minor_first) - len(tile))
    padded = (-(-size // step) * step for size, step in zip(minor_first, tile, strict=True))
    return math.prod(padded) * self.bits // 8

  @property
  def hbm(self) -> int:
    """Bytes in HBM: 0 if it lies in another memory."""
    return 0 if re.search(r"S\([1-9]", self.layout) else self.laid_out


@dataclasses.dataclass(frozen=True)
class Instruction:
  """One line.

  Attributes:
    arrays: of its result; several for a tuple.
    operands: names of instructions of the same computation.
    literal: what stands in the parentheses after the opcode.
    rest: all behind them.
  """

  name: str
  opcode: str
  arrays: tuple[Array, ...]
  operands: tuple[str, ...]
  literal: str
  rest: str

  def attribute(self, name: str) -> str | None:
    """The computation named by an attribute such as `body` or `calls`."""
    found = re.search(rf"\b{name}=%?([\w.\-]+)", self.rest)
    return found[1] if found else None

  def number(self, name: str) -> int | None:
    """A whole number of the backend's notes, quoted or not."""
    found = re.search(rf'\b{name}"?[:=]"?(-?\d+)', self.rest)
    return int(found[1]) if found else None

  @property
  def called(self) -> tuple[str, ...]:
    """Computations that it runs as parts of itself, but for a loop's."""
    branches = re.search(r"branch_computations=\{([^}]*)\}", self.rest)
    if branches:
      return tuple(_NAME.findall(branches[1]))
    names = ("calls", "true_computation", "false_computation")
    if self.opcode == "call":
      names += ("to_apply",)
    return tuple(found for name in names if (found := self.attribute(name)))

  @property
  def source(self) -> str:
    """What it was in JAX: "jit(step)/while/body/dot_general"; empty if the compiler made it."""
    found = re.search(r'op_name="([^"]*)"', self.rest)
    return found[1] if found else ""


class Computation(dict):
  """Instructions by name, in the order of the text.

  Attributes:
    root: name of the instruction that is its result.
  """

  def __init__(self, name: str):
    super().__init__()
    self.name = name
    self.root = ""

  @functools.cached_property
  def parameters(self) -> dict[int, str]:
    """Names of the parameters by number."""
    return {int(x.literal): x.name for x in self.values() if x.opcode == "parameter"}

  @functools.cached_property
  def users(self) -> dict[str, list[tuple[Instruction, int]]]:
    """Of each name: which instructions use it, as which operand."""
    users = {}
    for instruction in self.values():
      for i, operand in enumerate(instruction.operands):
        users.setdefault(operand, []).append((instruction, i))
    return users


@dataclasses.dataclass(frozen=True)
class Program:
  """All computations by name.

  Attributes:
    entry: name of the one that runs.
    partitions: devices that the program is split over, in one slice.
  """

  computations: dict[str, Computation]
  entry: str
  partitions: int

  def scheduled(self) -> Iterator[Computation]:
    """The entry and what it runs as loops, branches and calls: all but insides of fusions."""
    names, done = [self.entry], set()
    while names:
      if (name := names.pop()) in done:
        continue
      done.add(name)
      yield self.computations[name]
      for instruction in self.computations[name].values():
        if instruction.opcode == "while":
          names += [instruction.attribute("condition"), instruction.attribute("body")]
        elif instruction.opcode != "fusion":
          names += instruction.called


# ------------------------------------------------------------------ reading


def parse(text: str) -> Program:
  """Reads `compiled.as_text()`.

  Raises:
    ValueError: there is no entry computation.
  """
  partitions = re.search(r"num_partitions=(\d+)", text[: text.find("\n")])
  computations, entry, current, lines = {}, "", None, []

  def flush():
    if lines:
      _add(current, "".join(lines))
      lines.clear()

  for line in text.splitlines():
    if current is None:
      if header := _HEADER.match(line):
        current = computations[header[2]] = Computation(header[2])
        entry = header[2] if header[1] else entry
    elif line.startswith("}") and not line.startswith("}}"):
      flush()
      current = None
    else:
      if _START.match(line):
        flush()
      lines.append(line)  # else it goes on: some attributes span lines
  if not entry:
    raise ValueError("The text has no ENTRY computation: it is no compiled program's.")
  return Program(computations, entry, int(partitions[1]) if partitions else 1)


def _add(computation: Computation, line: str) -> None:
  """Reads one instruction into a computation."""
  start = _START.match(line)
  shape_end = (
    _closing(line, start.end()) if line[start.end()] == "(" else line.find(" ", start.end())
  )
  opcode = _OPCODE.match(line, shape_end)
  end = _closing(line, opcode.end() - 1)
  literal = line[opcode.end() : end - 1]
  computation[start[2]] = Instruction(
    name=start[2],
    opcode=opcode[1],
    arrays=arrays_of(line[start.end() : shape_end]),
    operands=() if opcode[1] == "constant" else tuple(_NAME.findall(literal)),
    literal=literal,
    rest=line[end:],
  )
  if start[1]:
    computation.root = start[2]


def arrays_of(text: str) -> tuple[Array, ...]:
  """All arrays of a type, tuples flattened."""
  found = _ARRAY.findall(text)
  return tuple(
    Array(dtype, tuple(int(n) for n in shape.replace("<=", "").split(",") if n), layout)
    for dtype, shape, layout in found
  )


def _closing(text: str, start: int) -> int:
  """The place behind the parenthesis that closes the one at `start`."""
  depth = 0
  for match in re.compile(r"[()]").finditer(text, start):
    depth += 1 if match[0] == "(" else -1
    if not depth:
      return match.end()
  raise ValueError(f"A parenthesis is not closed in {text[start : start + 80]!r}.")


# ------------------------------------------------------------------ arrays


# What names an array again without storing one.
_NO_ARRAY = {"parameter", "get-tuple-element", "tuple", "bitcast", "while", "conditional", "call"}


def stored_arrays(text: str) -> Iterator[tuple[Array, Instruction]]:
  """Every array that the program stores, in any memory: not what passes within a fusion."""
  program = parse(text)
  for computation in program.scheduled():
    for instruction in computation.values():
      given = instruction.opcode == "parameter" and computation.name == program.entry
      if given or instruction.opcode not in _NO_ARRAY:
        yield from ((array, instruction) for array in instruction.arrays)


def largest_arrays(text: str, count: int = 10) -> list[tuple[int, str, str]]:
  """The largest arrays that the program stores.

  Returns:
    (bytes as laid out, "bf16[8,128]", where it comes from), largest first, each type and
    shape once.
  """
  largest = {}
  for array, instruction in stored_arrays(text):
    where = instruction.source or instruction.name
    largest[str(array)] = max(largest.get(str(array), (0,)), (array.laid_out, str(array), where))
  return sorted(largest.values(), reverse=True)[:count]


def has_shape(text: str, shape: tuple[int, ...], dtype: str | None = None) -> bool:
  """Whether the program stores an array of this shape; sizes are those on one device.

  Args:
    dtype: as XLA writes it, "bf16"; None for any.
  """
  return any(
    array.shape == tuple(shape) and dtype in (None, array.dtype) for array, _ in stored_arrays(text)
  )


# ------------------------------------------------------------------ loops


def trip_count(program: Program, loop: Instruction, start) -> int | None:
  """How often a `while` runs its body; None if that is known at run time only.

  Taken from the compiler's note where there is one, else by running the loop's counters,
  which are constants, sums and comparisons of whole numbers.

  Args:
    start: `evaluate` of its operand.
  """
  known = re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.rest)
  if known:
    return int(known[1])
  body = program.computations[loop.attribute("body")]
  condition = program.computations[loop.attribute("condition")]
  if not isinstance(start, list) or body[body.root].opcode != "tuple":
    return None
  state, trips = start, 0
  while trips <= MAX_TRIPS:
    go = evaluate(program, condition, condition.root, [state])
    if not go:
      return trips if go is not None else None
    state = next_state(program, body, state)
    trips += 1
  return None


def next_state(program: Program, body: Computation, state: list) -> list:
  """A loop's state after its body, as far as it is made of known whole numbers."""
  return [
    None if value is None else evaluate(program, body, operand, [state])
    for value, operand in zip(state, body[body.root].operands, strict=True)
  ]


_COMPARE = {
  "LT": lambda a, b: a < b,
  "LE": lambda a, b: a <= b,
  "GT": lambda a, b: a > b,
  "GE": lambda a, b: a >= b,
  "EQ": lambda a, b: a == b,
  "NE": lambda a, b: a != b,
}
_ARITHMETIC = {
  "add": lambda a, b: a + b,
  "subtract": lambda a, b: a - b,
  "multiply": lambda a, b: a * b,
  "minimum": min,
  "maximum": max,
  "and": lambda a, b: a & b,
  "or": lambda a, b: a | b,
}
_SAME = {"copy", "copy-start", "copy-done", "bitcast", "reshape", "convert", "opt-barrier"}


def evaluate(program: Program, computation: Computation, name: str, parameters: list):
  """The value of a whole number, or a tuple's as a list; None for what is not known.

  Args:
    parameters: values of the computation's parameters; those missing are not known.
  """
  instruction = computation[name]
  again = lambda operand: evaluate(program, computation, operand, parameters)
  match instruction.opcode:
    case "constant":
      text = {"true": "1", "false": "0"}.get(instruction.literal, instruction.literal)
      return int(text) if re.fullmatch(r"-?\d+", text) else None
    case "parameter":
      number = int(instruction.literal)
      return parameters[number] if number < len(parameters) else None
    case "get-tuple-element":
      values = again(instruction.operands[0])
      return values[instruction.number("index")] if isinstance(values, list) else None
    case "tuple":
      return [again(operand) for operand in instruction.operands]
    case "compare":
      a, b = (again(operand) for operand in instruction.operands)
      if not isinstance(a, int) or not isinstance(b, int):
        return None
      return int(_COMPARE[instruction.attribute("direction")](a, b))
    case opcode if opcode in _ARITHMETIC:
      if any(array.shape for array in instruction.arrays):
        return None
      a, b = (again(operand) for operand in instruction.operands)
      return _ARITHMETIC[opcode](a, b) if isinstance(a, int) and isinstance(b, int) else None
    case opcode if opcode in _SAME:
      return again(instruction.operands[0])
    case "fusion":
      if len(instruction.arrays) > 1 or instruction.arrays[0].shape:
        return None
      inner = program.computations[instruction.attribute("calls")]
      values = [again(operand) for operand in instruction.operands]
      return evaluate(program, inner, inner.root, values)
  return None
