"""The entry points as a person at a terminal meets them."""

import json
import subprocess
import sys
import time

import pytest


def _run(*arguments):
  command = [sys.executable, "-m", *arguments]
  return subprocess.run(command, capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize(
  "name",
  "audit baselines compile evaluate export prepare_data pretrain_base studies study sweep train "
  "win_rate".split(),
)
def test_help_comes_at_once(name):
  started = time.perf_counter()
  done = _run(f"alignx_jax.{name}", "--help")
  assert time.perf_counter() - started < 3
  assert "--config" in done.stdout and "--workdir" in done.stdout


def test_nothing_on_the_training_path_imports_tensorflow():
  code = (
    "import sys, alignx_jax.train, alignx_jax.evaluation.report\n"
    "import alignx_jax.experiments.experiment\n"
    "print([name for name in ('tensorflow', 'seqio', 'torch') if name in sys.modules])"
  )
  done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
  assert done.stdout == "[]\n", done.stderr


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
  said = _refusal(tmp_path, "--config.regions.contxt=3")
  assert said.startswith("Error: ") and "'contxt'" in said and "context" in said


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
