"""TPU generations: what a chip holds and how fast it is, and topologies to compile for.

Nothing here needs a TPU: libtpu compiles for any topology it is told of.
"""

import dataclasses
import importlib.util
import math
import os
from typing import Any

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
  """One generation, per chip; JAX sees each chip as one device.

  Attributes:
    hbm_bytes: memory that a program can use, as the compiler's out-of-memory message says.
    flops: peak bfloat16 FLOP/s.
    hbm_bandwidth: bytes/s.
    links: connections to neighbours (ICI).
    link_bandwidth: bytes/s of one link in one direction.
    dcn_bandwidth: bytes/s between slices, the chip's share of its host's network.
    clock: cycles/s.
    small: shapes of a slice that does not fill cubes (3D) or is a part of a pod (2D).
    pod: the most chips of a slice.
    options: what get_topology_desc must be told.
  """

  name: str
  hbm_bytes: int
  flops: float
  hbm_bandwidth: float
  links: int
  link_bandwidth: float
  dcn_bandwidth: float
  clock: float
  small: tuple[tuple[int, ...], ...]
  pod: int
  options: tuple[tuple[str, Any], ...] = ()

  @property
  def dimensions(self) -> int:
    """Of the torus: two links along each."""
    return self.links // 2


_FLAT = ((1, 1), (2, 2), (2, 4), (4, 4), (4, 8), (8, 8), (8, 16), (16, 16))
_CUBOID = ((2, 2, 1), (2, 2, 2), (2, 2, 4), (2, 4, 4))

# hbm_bytes: libtpu's message for a program that is too big (tests/test_chips.py compiles one).
# dcn_bandwidth: "How to Scale Your Model" (the JAX scaling book), part 2, 2.5e10 bytes/s a host of
# 4 chips, unless a pod's figure is published.
# clock: where none is published, the peak divided by the products that the matrix units make in
# a cycle.
CHIPS = {
  # Jouppi et al. 2023, "TPU v4: An Optically Reconfigurable Supercomputer", table 4: 275 TFLOP/s,
  # 1,200 GB/s (1,228 in the Cloud TPU v4 documentation), 6 links of 50 GB/s, 1,050 MHz, 4,096
  # chips. Without "megacore" its two cores would be two devices with half the memory each.
  "v4": Chip(
    "v4",
    hbm_bytes=int(30.75 * GIB),
    flops=275e12,
    hbm_bandwidth=1.228e12,
    links=6,
    link_bandwidth=50e9,
    dcn_bandwidth=6.25e9,
    clock=1.05e9,
    small=_CUBOID,
    pod=4096,
    options=(("chip_config_name", "megacore"),),
  ),
  # Cloud TPU v5e documentation: 197 TFLOP/s, 819 GB/s, 400 GB/s to and from a chip over 4 ports,
  # data centre network of a pod of 256 chips 6.4 Tbit/s. Clock: the scaling book, part 2.
  "v5e": Chip(
    "v5e",
    hbm_bytes=int(15.75 * GIB),
    flops=197e12,
    hbm_bandwidth=819e9,
    links=4,
    link_bandwidth=50e9,
    dcn_bandwidth=6.4e12 / 8 / 256,
    clock=1.5e9,
    small=_FLAT,
    pod=256,
  ),
  # Cloud TPU v5p documentation: 459 TFLOP/s, 2,765 GB/s, 4,800 Gbit/s out of a chip over 6 links,
  # at most 6,144 chips a slice. Clock: 459e12 / (2 · 8 units · 128²).
  "v5p": Chip(
    "v5p",
    hbm_bytes=int(95.73 * GIB),
    flops=459e12,
    hbm_bandwidth=2.765e12,
    links=6,
    link_bandwidth=100e9,
    dcn_bandwidth=6.25e9,
    clock=1.75e9,
    small=_CUBOID,
    pod=6144,
  ),
  # Cloud TPU v6e documentation: 918 TFLOP/s, 1,638 GB/s, 800 GB/s to and from a chip over 4
  # ports. Network between slices: 100 Gbit/s a chip, from the pod's 25.6 Tbit/s. Clock: 918e12 /
  # (2 · 2 units · 2 · 256²); a unit that made one 256² product a cycle would need 3.5 GHz, and
  # libtpu's own cycle counts for large products come to 0.87 of 2 · 2 · 2 · 256² a cycle.
  "v6e": Chip(
    "v6e",
    hbm_bytes=int(31.24 * GIB),
    flops=918e12,
    hbm_bandwidth=1.638e12,
    links=4,
    link_bandwidth=100e9,
    dcn_bandwidth=12.5e9,
    clock=1.75e9,
    small=_FLAT,
    pod=256,
  ),
}


def peak_flops(device) -> float | None:
  """Peak bfloat16 FLOP/s of a JAX device; None where it is not known, as of CPUs."""
  names = {"v5 lite": "v5e", "v5": "v5p", "v6 lite": "v6e"}
  kind = device.device_kind.removeprefix("TPU ")
  chip = CHIPS.get(names.get(kind, kind)) if device.platform == "tpu" else None
  return chip and chip.flops


@dataclasses.dataclass(frozen=True)
class Topology:
  """Chips to compile for.

  Attributes:
    name: as given, "v5e:8x8".
    shape: chips of one slice along each axis of the torus.
    wrap: whether the ends of each axis are connected.
    devices: of all slices; for jax.sharding.Mesh.
  """

  name: str
  chip: Chip
  shape: tuple[int, ...]
  wrap: tuple[bool, ...]
  slices: int
  devices: tuple = dataclasses.field(repr=False)

  @property
  def chips(self) -> int:
    return len(self.devices)


def parse_topology(name: str, *, slices: int = 1) -> Topology:
  """The topology of a name such as "v5e:8x8" or "v5p:4x4x4".

  Needs libtpu but no TPU, and the environment variable JAX_PLATFORMS=cpu.

  Args:
    slices: copies of it, connected by the data centre's network.
  Raises:
    ValueError: an unknown chip, or a shape that its slices do not come in; lists what there is.
    ImportError: libtpu is not installed.
  """
  kind, _, sizes = name.partition(":")
  if kind not in CHIPS:
    raise ValueError(f"No chip {kind!r} in topology {name!r}; there are {', '.join(CHIPS)}.")
  chip = CHIPS[kind]
  try:
    shape = tuple(int(size) for size in sizes.split("x"))
  except ValueError:
    shape = ()
  # Slices of three dimensions are either small or made of whole cubes of 4³ chips.
  cubes = chip.dimensions == 3 and all(size > 0 and size % 4 == 0 for size in shape)
  known = len(shape) == chip.dimensions and (shape in chip.small or cubes)
  if not known or math.prod(shape) > chip.pod:
    shapes = ", ".join("x".join(map(str, small)) for small in chip.small)
    more = " and multiples of 4x4x4" if chip.dimensions == 3 else ""
    raise ValueError(
      f"Topology {name!r}: slices of {kind} have the shapes {shapes}{more}, of at most "
      f"{chip.pod} chips, written like {kind}:{'x'.join(map(str, chip.small[1]))}."
    )
  if slices < 1:
    raise ValueError(f"{slices} slices of {name}: there must be 1 or more.")
  # Optical switches close the axes of whole cubes; of a flat pod only its full axes are closed.
  wrap = (True,) * 3 if cubes else tuple(size == 16 for size in shape)
  options = dict(chip.options) | {"wrap": (*wrap, False)[:3]}
  if slices > 1:
    options["num_slices"] = slices
  if math.prod(shape) == 1:
    options["chips_per_host_bounds"] = (1, 1, 1)
  devices = _describe(f"{kind}:{sizes}", options)
  return Topology(name, chip, shape, wrap, slices, devices)


def _describe(name: str, options: dict) -> tuple:
  """JAX's devices of a topology."""
  if importlib.util.find_spec("libtpu") is None and "TPU_LIBRARY_PATH" not in os.environ:
    raise ImportError("Compiling for TPUs needs libtpu: pip install -e '.[tpu]'.")
  # Read when libtpu is loaded: no question to a metadata server, and no lock that would keep
  # two compilations from running at once.
  os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
  os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
  from jax.experimental import topologies

  topology = topologies.get_topology_desc(platform="tpu", topology_name=name, **options)
  return tuple(topology.devices)
