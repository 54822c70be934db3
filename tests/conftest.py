"""Fixtures of every test: the shared goldens, and JAX on the CPU."""

import os
from pathlib import Path

import pytest

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=2")

SHARED = Path(__file__).parents[2] / "shared"


@pytest.fixture(scope="session")
def shared() -> Path:
  """The folder of goldens beside the checkout."""
  if not SHARED.exists():
    pytest.skip(f"the goldens are not beside this checkout, in {SHARED}")
  return SHARED
