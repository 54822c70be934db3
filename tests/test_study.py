"""The whole main job on a tiny model: every row, report and picture, and the same again."""

import json

import pytest

from alignx_jax import study
from configs import study_simulated


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
  config = study_simulated.get_config()
  config.model.weights = "preset:tiny"
  config.data.update(train_records=6, test_records=4)
  config.regions.update(context=2048, response=256, examples=2)
  config.train.update(rows=2, devices=1)
  config.eval.rows = 2
  workdir = tmp_path_factory.mktemp("study")
  return config, workdir, study.run_study(config, workdir, command="python -m alignx_jax.study")


def test_every_policy_condition_and_protocol_is_measured(finished):
  _, workdir, results = finished
  assert json.loads((workdir / "results.json").read_text()) == results
  found = {(r["policy"], r["condition"], r["protocol"]) for r in results}
  three = ("matched", "release", "unconditioned")
  assert found == {
    ("length", "length", "none"),
    *(("base", condition, "unconditioned") for condition in ("persona", "inferred", "golden")),
    *(("ica", condition, protocol) for condition in ("persona", "shuffled") for protocol in three),
    *(
      ("pba", condition, protocol)
      for condition in ("inferred", "golden", "shuffled")
      for protocol in three
    ),
    ("ica", "none", "matched"),
    ("pba", "none", "matched"),
  }
  assert len(found) == len(results)
  for row in results:
    assert 0 <= row["low"] <= row["accuracy"] <= row["high"] <= 1
    assert row["examples"] == 4


def test_a_report_a_picture_and_both_runs_are_left_behind(finished):
  _, workdir, _ = finished
  report = (workdir / "report.html").read_text(encoding="utf-8")
  assert "One simulated test user" in report and report.count("<svg") > 3
  assert (workdir / "accuracy.svg").read_text(encoding="utf-8").startswith("<svg")
  for name in ("ica", "pba"):
    assert (workdir / name / "metrics.jsonl").exists()
    assert json.loads((workdir / name / "config.json").read_text())["objective"]["name"] == name


def test_the_same_study_again_gives_the_same_results(finished):
  config, workdir, results = finished
  assert study.run_study(config, workdir) == results
