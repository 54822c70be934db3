"""The commands of README.md and docs/ work as they stand there. README.md's are run by .ci/run."""

import json
import os
import re
import shlex
import subprocess

import jax
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from flax import nnx

from alignx_jax.experiments import experiment as experiments
from alignx_jax.models.pretrained import load_decoder
from alignx_jax.personas.simulator import simulate_record
from configs import smollm2_p_soups_ica
from tests.pages import ROOT, shown_on_pages

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
  commands = shown_on_pages(r"^python .*smollm2")
  assert [shlex.split(command)[2].split(".")[1] for command in commands] == [
    *("train", "train", "evaluate", "export")
  ]
  for command in commands:
    small = [f"--{name}={value}" for name, value in SMALL.items()]
    arguments = shlex.split(command.replace("runs/", f"{tmp_path}/")) + small
    done = subprocess.run(arguments, cwd=ROOT, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    if "export" not in command:
      assert "| policy" in done.stdout and "| shuffled " in done.stdout
  for name in ("smollm2_ica", "smollm2_pba"):
    assert (tmp_path / name / "results.json").exists()
  # What was exported is what was trained, bit by bit.
  config = smollm2_p_soups_ica.get_config()
  config.update_from_flattened_dict({k.removeprefix("config."): v for k, v in SMALL.items()})
  experiment = experiments.load_experiment(config)
  trained = experiments.trained_params(experiment, tmp_path / "smollm2_ica")
  exported = nnx.state(load_decoder(tmp_path / "smollm2_ica" / "hf"))
  changed = 0
  for ours, theirs, base in zip(
    *map(jax.tree.leaves, (trained, exported, experiment.load_base())), strict=True
  ):
    np.testing.assert_array_equal(ours, theirs)
    changed += bool(np.any(ours != base))
  assert changed == len(jax.tree.leaves(trained))


def _one_step(command, tmp_path):
  """What a command of several runs prints when each takes a step, on a few users."""
  small = {"train_records": 8, "test_records": 4, "validation_records": 4}
  flags = [f"--config.data.{name}={value}" for name, value in small.items()]
  arguments = shlex.split(command.replace("runs/", f"{tmp_path}/"))
  arguments += [*flags, "--config.train.steps=1"]
  done = subprocess.run(arguments, cwd=ROOT, capture_output=True, text=True, timeout=1800)
  assert done.returncode == 0, done.stderr[-3000:]
  return done.stdout


@pytest.mark.long
def test_the_command_of_the_baselines(tmp_path):
  (command,) = shown_on_pages(r"alignx_jax\.baselines ")
  printed = _one_step(command, tmp_path)
  for policy in ("length", "base", "dpo", "pba", "vpl"):
    assert f"| {policy:6} |" in printed
  assert "of 16 dimensions are active over 4 users" in printed


@pytest.mark.long
def test_the_command_of_the_bridge(tmp_path):
  (command,) = shown_on_pages(r"^python .*configs/bridge_simulated\.py")
  printed = _one_step(command, tmp_path)
  for condition in ("inferred", "golden", "shuffled", "none"):
    assert f"| pba_head | {condition:9} | matched " in printed
  assert "| head " in printed and "| labels averaged |" in printed


@pytest.mark.long
def test_the_command_that_sweeps(tmp_path):
  (command,) = shown_on_pages(r"alignx_jax\.sweep ")
  printed = _one_step(command, tmp_path)
  table = pq.read_table(tmp_path / "beta" / "sweep.parquet").to_pylist()
  assert [row["status"] for row in table] == ["finished"] * 15
  assert len(re.findall(r"^\| \S*beta [\d.]+ ", printed, re.MULTILINE)) == 5
  assert (tmp_path / "beta" / "sweep.html").exists()


@pytest.mark.long
def test_commands_of_studies(tmp_path):
  commands = shown_on_pages(r"alignx_jax\.studies ")
  few = {"history_length": {"users": 4}, "novel_preferences": {"users": 4, "examples": "(2,)"}}
  small = SMALL | {"config.data.validation_records": 4, "config.regions.parts": 64}
  for command in commands:
    name = re.search(r"configs/studies/(\w+)[.]py", command)[1]
    more = {f"config.study.{field}": value for field, value in few.get(name, {}).items()}
    arguments = shlex.split(command.replace("runs/", f"{tmp_path}/"))
    arguments += [f"--{field}={value}" for field, value in (small | more).items()]
    done = subprocess.run(arguments, cwd=ROOT, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.startswith("| policy")
    assert (tmp_path / name / "report.html").exists()
  assert {p.name for p in (tmp_path / "study").iterdir()} == {"ica", "pba", "pba_head"}
  assert len(commands) == 3


@pytest.mark.slow
def test_commands_that_generate(tmp_path):
  commands = [*map(shlex.split, shown_on_pages(r"alignx_jax\.generate (?!.*--users)"))]
  compared = [*map(shlex.split, shown_on_pages(r"alignx_jax\.(generate .*--users|win_rate )"))]
  assert (len(commands), len(compared)) == (2, 3)
  config = "--config=configs/study_simulated.py"
  small = [f"--{name}={value}" for name, value in SMALL.items()]
  for name, kind in (("pba", "text"), ("pba_head", "head")):
    run = ["python", "-m", "alignx_jax.train", config, f"--workdir={tmp_path}/study/{name}", *small]
    run += ["--config.objective.name=pba", f"--config.bridge.kind={kind}"]
    subprocess.run(run, cwd=ROOT, capture_output=True, timeout=600, check=True)
  persona = {"Demographic Information": "Someone who likes music."}
  request = {"prompt": "A free evening?", "judge": persona} | persona
  (tmp_path / "requests.jsonl").write_text(json.dumps(request) + "\n", encoding="utf-8")
  told = []
  for command in commands:
    assert command[3] == config
    arguments = [a.replace("runs/", f"{tmp_path}/") for a in command]
    arguments = [a.replace("=requests", f"={tmp_path}/requests") for a in arguments]
    arguments = [a.replace("=answers", f"={tmp_path}/answers") for a in arguments]
    done = subprocess.run(
      arguments, cwd=ROOT, capture_output=True, text=True, timeout=300, input="Tea?\n"
    )
    assert done.returncode == 0, done.stderr[-3000:]
    told.append(done.stdout)
  for text, condition in zip(told, ("inferred", "bridge"), strict=True):
    assert f"conditioned on: {condition}" in text
  assert "1 answered, 0 answered before, 0 refused" in told[1]
  answer = json.loads((tmp_path / "answers.jsonl").read_text(encoding="utf-8"))
  assert answer["passes_per_token"] >= 1
  for command in compared:
    arguments = [a.replace("runs/", f"{tmp_path}/").replace("=100", "=8") for a in command]
    done = subprocess.run(arguments, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
  assert "| simulated |" in done.stdout and "8 pairs judged, 0 not judged" in done.stdout


@pytest.mark.slow
def test_commands_on_benchmarks(tmp_path):
  commands = [*map(shlex.split, shown_on_pages(r" --benchmarks=|alignx_jax\.compare "))]
  assert [command[2] for command in commands] == [
    *["alignx_jax.evaluate"] * 2,
    "alignx_jax.compare",
  ]
  small = ["--config=configs/study_simulated.py", *(f"--{n}={v}" for n, v in SMALL.items())]
  published = tmp_path / "published"
  published.mkdir()
  records = [simulate_record(i, split="test", seed=0) for i in range(6)]
  for name in commands[0][5].removeprefix("--benchmarks=").split(","):
    own = [dict(record) for record in records]
    for record in own:
      for part in (record, *record.get("User-Generated Content", ())):
        part.pop("Preference Direction", None)  # of 90 dimensions, which UF-P-4 has not
      for pair in record.get("Pair-wise Comparative Feedback", ()):
        pair.pop("Preference Direction", None)
      record["profile"] = "Likes music"
    (published / f"{name}.json").write_text(json.dumps(own), encoding="utf-8")
  for command, objective in zip(commands, ("ica", "pba", ""), strict=True):
    arguments = [a.replace("runs/", f"{tmp_path}/") for a in command]
    arguments = [a.replace("=published", f"={published}") for a in arguments]
    if objective:
      assert f"configs/{objective}_llama31_8b.py" in arguments[3]
      own = [*small, f"--config.objective.name={objective}"]
      run = ["python", "-m", "alignx_jax.train", arguments[4], *own]
      subprocess.run(run, cwd=ROOT, capture_output=True, timeout=600, check=True)
      arguments[3:4] = own
    done = subprocess.run(arguments, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "| uf_p_4 " in done.stdout if not objective else "published %" in done.stdout
  assert len(list((tmp_path / "ica" / "benchmarks").glob("*.parquet"))) == 7
  assert (tmp_path / "pba" / "benchmarks" / "report.html").exists()


@pytest.mark.long
def test_the_command_that_audits(tmp_path):
  (command,) = map(shlex.split, shown_on_pages(r"alignx_jax\.audit "))
  small = [f"--{name}={value}" for name, value in SMALL.items()]
  run = ["python", "-m", "alignx_jax.train", command[3], f"--workdir={tmp_path}/study/ica", *small]
  run += ["--config.data.demographics=0.5", "--config.objective.groups=gender"]
  run += ["--config.objective.group_step=0.01"]
  subprocess.run(run, cwd=ROOT, capture_output=True, timeout=600, check=True)
  arguments = [a.replace("runs/", f"{tmp_path}/") for a in command]
  arguments += [*small, "--config.data.demographics=0.5", "--dimension=Likes music"]
  done = subprocess.run(arguments, cwd=ROOT, capture_output=True, text=True, timeout=300)
  assert done.returncode == 0, done.stderr[-3000:]
  assert "too few to say" in done.stdout and "| Likes music |" in done.stdout
  assert (tmp_path / "study/ica/bias.html").exists()


@pytest.mark.slow
def test_commands_that_prepare_data(tmp_path):
  commands = shown_on_pages(r"alignx_jax\.prepare_data ")
  assert len(commands) == 2
  (tmp_path / "published").mkdir()
  records = [simulate_record(i, split="train", seed=0) for i in range(20)]
  pq.write_table(pa.Table.from_pylist(records), tmp_path / "published" / "Reddit.parquet")
  for command, count in zip(commands, (20, 1500), strict=True):
    arguments = shlex.split(command.replace("data/", "out/"))
    arguments = [a.replace("configs/", f"{ROOT}/configs/") for a in arguments]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
      arguments, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert f"{count:,} records, 0 refused" in done.stdout
  assert "8192 persona" in done.stdout
  assert (tmp_path / "out/simulated/regions.json").exists()
  assert (tmp_path / "out/train/data_card.json").exists()
