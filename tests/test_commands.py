"""The entry points as a person at a terminal meets them."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from alignx_jax import command_line

ROOT = Path(__file__).parents[1]
COMMANDS = sorted(
  path.stem for path in ROOT.glob("alignx_jax/*.py") if "command_line.run(" in path.read_text()
)


def _run(*arguments):
  command = [sys.executable, "-m", *arguments]
  return subprocess.run(command, capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize("name", COMMANDS)
def test_help_comes_at_once(name):
  before = os.times()
  done = _run(f"alignx_jax.{name}", "--help")
  after = os.times()  # not by the clock: others may want the cores
  used = after.children_user - before.children_user
  assert used + after.children_system - before.children_system < 2
  said = ("--first", "--second") if name == "compare" else ("--config", "--workdir")
  assert all(flag in done.stdout for flag in said)


def test_nothing_on_the_training_path_imports_tensorflow():
  code = (
    "import sys, alignx_jax.train, alignx_jax.evaluation.report\n"
    "import alignx_jax.experiments.experiment\n"
    "print([name for name in ('tensorflow', 'seqio', 'torch') if name in sys.modules])"
  )
  done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
  assert done.stdout == "[]\n", done.stderr


def test_a_config_that_is_not_there_is_named_in_one_sentence(tmp_path):
  done = _run("alignx_jax.train", "--config=configs/nope.py", f"--workdir={tmp_path}")
  assert done.returncode == 1 and "Traceback" not in done.stderr
  assert done.stderr.startswith("Error: --config: ") and "'configs/nope.py'" in done.stderr


def test_arrays_lie_in_huge_pages():
  code = (
    "import os; from alignx_jax import command_line\n"
    "command_line._use_huge_pages()\n"
    "print(os.environ.get('GLIBC_TUNABLES'))"
  )
  enabled = Path("/sys/kernel/mm/transparent_hugepage/enabled")
  if not enabled.exists() or "[madvise]" not in enabled.read_text():
    pytest.skip("needs a Linux that gives huge pages to those who ask")
  env = os.environ | {"GLIBC_TUNABLES": "glibc.malloc.check=0"}
  done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
  assert done.stdout == "glibc.malloc.check=0:glibc.malloc.hugetlb=1\n", done.stderr


def _kept_programs(monkeypatch, **variables):
  """Where a command keeps compiled programs, given these environment variables alone."""
  for name in ("JAX_COMPILATION_CACHE_DIR", "JAX_COMPILATION_CACHE_MAX_SIZE", "XDG_CACHE_HOME"):
    monkeypatch.delenv(name, raising=False)
  for name, value in variables.items():
    monkeypatch.setenv(name, str(value))
  with monkeypatch.context() as patch:
    patch.setattr(os, "environ", dict(os.environ))
    command_line._keep_programs()
    return os.environ.get("JAX_COMPILATION_CACHE_DIR")


def test_programs_are_kept_for_the_next_start_on_the_same_kind_of_cpu(tmp_path, monkeypatch):
  kept = Path(_kept_programs(monkeypatch, XDG_CACHE_HOME=tmp_path))
  assert kept.is_dir() and kept.parent == tmp_path / "alignx_jax"
  assert Path(_kept_programs(monkeypatch, XDG_CACHE_HOME=tmp_path)) == kept
  with monkeypatch.context() as patch:
    patch.setattr(Path, "read_text", lambda self: "flags\t\t: fpu sse avx2\n")
    other = Path(_kept_programs(monkeypatch, XDG_CACHE_HOME=tmp_path))
  assert other != kept and other.parent == kept.parent


def test_programs_are_kept_where_jax_is_told_or_nowhere(tmp_path, monkeypatch):
  told = str(tmp_path / "told")
  given = {"XDG_CACHE_HOME": tmp_path, "JAX_COMPILATION_CACHE_DIR": told}
  assert _kept_programs(monkeypatch, **given) == told
  (tmp_path / "file").touch()
  assert _kept_programs(monkeypatch, XDG_CACHE_HOME=tmp_path / "file") is None
  assert not (tmp_path / "alignx_jax").exists()


def test_a_program_is_found_again_and_half_of_one_is_not_kept(tmp_path, monkeypatch):
  kept = Path(_kept_programs(monkeypatch, XDG_CACHE_HOME=tmp_path))
  (kept / "half-cache").write_bytes(b"a process was killed")
  code = (
    "from alignx_jax import command_line; command_line._keep_programs()\n"
    "import jax; jax.jit(lambda x: x + 1)(1.0)"
  )
  env = {key: value for key, value in os.environ.items() if not key.startswith("JAX_COMPILATION")}
  env |= {"XDG_CACHE_HOME": str(tmp_path), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
  before = {}
  for _ in range(2):
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
    assert done.returncode == 0 and "persistent" not in done.stderr, done.stderr
    programs = {path.name: path.stat().st_mtime_ns for path in kept.glob("*-cache")}
    assert programs and "half-cache" not in programs
    assert not before or programs == before
    before = programs


def _refusal(tmp_path, *changes):
  done = _run(
    "alignx_jax.train",
    "--config=configs/base.py",
    f"--workdir={tmp_path / 'run'}",
    "--config.model.weights=preset:tiny",
    *changes,
  )
  assert done.returncode == 1
  assert "Traceback" not in done.stderr
  return done.stderr.strip().splitlines()[-1]


def test_an_unknown_config_field_is_refused_in_one_sentence(tmp_path):
  for field, meant in (("regions.contxt", "context"), ("regins.context", "regions")):
    said = _refusal(tmp_path, f"--config.{field}=3")
    wrong = next(name for name in field.split(".") if name not in ("regions", "context"))
    assert said.startswith("Error: ") and f"'{wrong}'" in said and meant in said


def test_a_bad_record_is_refused_in_one_sentence_with_file_record_field_and_remedy(tmp_path):
  record = {"prompt": "Tea?", "chosen": "Yes.", "rejected": " "}
  path = tmp_path / "users.json"
  path.write_text(json.dumps([record | {"rejected": "No."}, record]))
  said = _refusal(tmp_path, f"--config.data.path={path}")
  assert said == ("Error: users.json:1: field 'rejected' is empty; drop the record or fill it in.")


def test_a_truncated_file_is_refused_in_one_sentence(tmp_path):
  path = tmp_path / "users.json"
  path.write_text('[{"prompt": "Tea?", "chos')
  said = _refusal(tmp_path, f"--config.data.path={path}")
  assert said.startswith(f"Error: {path} is not whole JSON (")
  assert said.endswith("; fetch it again.")
