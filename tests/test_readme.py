"""The README's commands work as they stand there. The first two are run by .ci/run."""

import re
import shlex
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
COMMANDS = re.findall(
  r"^python -m alignx_jax\..*$", (ROOT / "README.md").read_text(encoding="utf-8"), re.MULTILINE
)
# One step on a few simulated users in small rows, instead of real data and half an hour.
SMALL = {
  "config.data.path": "simulated",
  "config.data.train_records": 4,
  "config.data.test_records": 4,
  "config.regions.context": 768,
  "config.regions.response": 96,
  "config.regions.examples": 2,
  "config.train.steps": 1,
  "config.train.rows": 2,
  "config.train.accumulation": 1,
  "config.eval.rows": 2,
}


@pytest.mark.slow
def test_commands_on_a_real_model(tmp_path, smollm2_path):
  assert len(COMMANDS) == 3
  for command in COMMANDS:
    small = [f"--{name}={value}" for name, value in SMALL.items()]
    arguments = shlex.split(command.replace("runs/", f"{tmp_path}/")) + small
    done = subprocess.run(arguments, cwd=ROOT, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "| policy" in done.stdout and "| shuffled " in done.stdout
  for name in ("smollm2_ica", "smollm2_pba"):
    assert (tmp_path / name / "results.json").exists()


def test_every_file_the_readme_points_to_is_there():
  text = (ROOT / "README.md").read_text(encoding="utf-8")
  links = [link for link in re.findall(r"\]\(([^)]+)\)", text) if "://" not in link]
  folders = re.findall(r"`((?:alignx_jax|configs)/[\w/.]*)`", text)
  configs = re.findall(r"configs/\w+\.py", text)
  assert links and folders and configs
  for path in (*links, *folders, *configs):
    assert (ROOT / path).exists(), path
