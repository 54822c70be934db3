"""The studies on a tiny model, from config to report; what they train is read again."""

import json

import pytest

from alignx_jax import studies
from alignx_jax.experiments.studies import run_study
from alignx_jax.experiments.study import RUNS
from configs.studies import controllability, history_length, novel_preferences


def small(config, runs):
  config.model.weights = "preset:tiny"
  config.data.update(train_records=6, validation_records=4, test_records=4)
  config.regions.update(context=2048, response=256, examples=2)
  config.regions.update(prompt=256, persona=1536, parts=24)
  config.train.update(rows=2, devices=1)
  config.eval.rows = 2
  with config.unlocked():
    for name in RUNS:
      config.study[name] = {}
  config.study.runs = str(runs)
  return config


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
  return tmp_path_factory.mktemp("runs")


def run(config, workdir, capsys):
  studies.main(config, workdir)
  printed = capsys.readouterr().out
  results = json.loads((workdir / "results.json").read_text())
  report = (workdir / "report.html").read_text(encoding="utf-8")
  assert "<svg" in report and printed.startswith("| policy")
  assert (workdir / f"{config.study.name}.svg").read_text(encoding="utf-8").startswith("<svg")
  return {(r["policy"], r["condition"], r["protocol"]): r for r in results}


@pytest.mark.long
def test_controllability_from_config_to_report(runs, tmp_path, capsys):
  found = run(small(controllability.get_config(), runs), tmp_path, capsys)
  both = ("matched", "unconditioned")
  turned = ("reversed", "golden reversed", "another reversed", "exchanged", "pairs exchanged")
  doses = [f"strength {s / 4:+g}" for s in range(-4, 5)]
  assert set(found) == {
    *(("ica", condition, p) for condition in turned[3:] for p in both),
    *(("pba", condition, p) for condition in (*turned, *doses[::4]) for p in both),
    *(("pba_head", condition, "matched") for condition in (*turned, *doses)),
  }
  for row in found.values():
    assert row["examples"] == 4
    for name in ("flips", "change"):
      assert row[f"{name}_low"] <= row[name] <= row[f"{name}_high"]
  unsteered = found["pba_head", "strength +0", "matched"]
  assert unsteered["margin"] == unsteered["margin_before"]


@pytest.mark.long
def test_history_length_from_config_to_report(runs, tmp_path, capsys):
  config = small(history_length.get_config(), runs)
  config.study.update(users=4, acts=(0, 1, 3), comments=3, pairs=2)
  config.study.regions.update(context=2300, response=256, examples=2)
  config.study.regions.update(prompt=256, persona=2300, parts=24)
  found = run(config, tmp_path, capsys)
  seen = ("0 acts", "1 comments", "3 comments", "1 pairs", "1 acts", "3 acts")
  assert set(found) == {(p, c, "matched") for p in ("ica", "pba", "pba_head") for c in seen}
  assert {row["examples"] for row in found.values()} == {4}


@pytest.mark.long
def test_novel_preferences_from_config_to_report(tmp_path, capsys):
  config = small(novel_preferences.get_config(), "")
  config.study.update(examples=(2, 4), users=4)
  found = run(config, tmp_path, capsys)
  both = ("matched", "unconditioned")
  starts = ("aligned + 0", "aligned + 2", "aligned + 4", "base + 2", "base + 4")
  assert set(found) == {
    *(("ica", start, protocol) for start in starts for protocol in both),
    ("ica", "base + 0", "unconditioned"),
  }
  for n in (2, 4):
    row = found["ica", f"aligned + {n}", "matched"]
    assert row["ratio"] == row["base_needs"] / n
  # Nothing that was trained is trained again.
  before = {p: p.read_bytes() for p in tmp_path.glob("*/metrics.jsonl")}
  assert len(before) == 5 and run(config, tmp_path, capsys) == found
  assert before == {p: p.read_bytes() for p in tmp_path.glob("*/metrics.jsonl")}


def test_an_unknown_study_is_refused(tmp_path):
  config = controllability.get_config()
  config.study.name = "everything"
  with pytest.raises(ValueError, match="study.name is 'everything'; set it to controllability"):
    run_study(config, tmp_path)
