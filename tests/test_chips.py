"""The table of chips against the compiler, and topologies by name."""

import os
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from alignx_jax.ahead.chips import CHIPS, GIB, parse_topology

os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")

SMALLEST = {"v4": "v4:2x2x1", "v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2"}


@pytest.mark.parametrize("kind", CHIPS)
def test_memory_of_a_chip_is_what_the_compiler_says(kind):
  devices = np.array(parse_topology(SMALLEST[kind]).devices[:1])
  sharding = NamedSharding(Mesh(devices, ("x",)), PartitionSpec())
  too_big = jax.ShapeDtypeStruct((128, 1 << 30), jnp.float32, sharding=sharding)
  with pytest.raises(Exception, match="RESOURCE_EXHAUSTED") as error:
    jax.jit(lambda x: x + 1).lower(too_big).compile()
  available = re.search(r"available HBM \(([\d.]+)G\)", str(error.value))
  assert CHIPS[kind].hbm_bytes / GIB == pytest.approx(float(available[1]), abs=0.011)


@pytest.mark.parametrize("kind", CHIPS)
def test_a_chip_is_one_device(kind):
  assert parse_topology(SMALLEST[kind]).chips == 4


@pytest.mark.parametrize("kind", CHIPS)
def test_products_at_the_peak_take_about_the_compilers_cycles(kind):
  """The clock goes with the peak: large products come to 70 to 100 % of it."""
  size = 4096
  devices = np.array(parse_topology(SMALLEST[kind]).devices[:1])
  sharding = NamedSharding(Mesh(devices, ("x",)), PartitionSpec())
  x = jax.ShapeDtypeStruct((size, size), jnp.bfloat16, sharding=sharding)
  text = jax.jit(jnp.matmul).lower(x, x).compile().as_text()
  cycles = sum(int(count) for count in re.findall(r'"estimated_cycles":"(\d+)"', text))
  share = 2 * size**3 / CHIPS[kind].flops / (cycles / CHIPS[kind].clock)
  assert 0.7 < share <= 1


def test_slices_are_told_apart():
  topology = parse_topology("v5e:2x2", slices=2)
  assert topology.chips == 8
  assert sorted(device.slice_index for device in topology.devices) == [0] * 4 + [1] * 4


@pytest.mark.parametrize(
  "name, chips, wrap",
  [
    ("v5e:1x1", 1, (False, False)),
    ("v5e:8x16", 128, (False, True)),
    ("v6e:16x16", 256, (True, True)),
    ("v5p:2x2x4", 16, (False, False, False)),
    ("v5p:4x4x8", 128, (True, True, True)),
    ("v4:4x4x4", 64, (True, True, True)),
  ],
)
def test_rings_close_where_the_hardware_closes_them(name, chips, wrap):
  topology = parse_topology(name)
  assert (topology.chips, topology.wrap) == (chips, wrap)


@pytest.mark.parametrize(
  "name, slices, message",
  [
    ("v7:2x2", 1, "No chip 'v7'.* v4, v5e, v5p, v6e"),
    ("v5e", 1, "shapes 1x1, 2x2.* written like v5e:2x2"),
    ("v5e:64", 1, "shapes 1x1"),
    ("v5e:3x5", 1, "shapes 1x1"),
    ("v5e:4x4x4", 1, "shapes 1x1"),
    ("v5p:4x4", 1, "multiples of 4x4x4"),
    ("v5p:4x4x6", 1, "multiples of 4x4x4"),
    ("v5p:32x32x32", 1, "at most 6144 chips"),
    ("v5e:2x2", 0, "0 slices"),
  ],
)
def test_topologies_that_there_are_not_are_refused(name, slices, message):
  with pytest.raises(ValueError, match=message):
    parse_topology(name, slices=slices)
