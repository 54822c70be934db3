"""The whole main job on a tiny model: every row, report and picture, and the same again."""

import json

import pytest

from alignx_jax.experiments import study
from configs import study_simulated
from tests.pages import shown_on_pages

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
  config = study_simulated.get_config()
  config.model.weights = "preset:tiny"
  config.data.update(train_records=6, validation_records=4, test_records=4)
  config.regions.update(context=2048, response=256, examples=2)
  config.regions.update(prompt=256, persona=1536, parts=24)
  config.train.update(rows=2, devices=1)
  with config.unlocked():
    config.study = {name: {} for name in study.RUNS} | {"few_acts_pairs": 3}
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
    *(
      ("pba_head", condition, protocol)
      for condition in ("inferred", "golden", "shuffled")
      for protocol in ("matched", "release")
    ),
    *((policy, "none", "matched") for policy in ("ica", "pba", "pba_head")),
    ("pba", "profile", "matched"),
    *((policy, f"{n} acts", "matched") for policy in ("ica", "pba_head") for n in range(3)),
  }
  assert len(found) == len(results)
  for row in results:
    assert 0 <= row["low"] <= row["accuracy"] <= row["high"] <= 1
    assert row["examples"] == (3 if row["condition"].endswith("acts") else 4)


def test_a_report_pictures_and_all_runs_are_left_behind(finished):
  _, workdir, _ = finished
  report = (workdir / "report.html").read_text(encoding="utf-8")
  assert "One simulated test user" in report and report.count("<svg") > 3
  assert (workdir / "accuracy.svg").read_text(encoding="utf-8").startswith("<svg")
  for name in ("ica", "pba", "pba_head"):
    assert (workdir / name / "metrics.jsonl").exists()
    saved = json.loads((workdir / name / "config.json").read_text())
    assert (saved["objective"]["name"], saved["bridge"]["kind"]) == study.RUNS[name]
  predictors = [row["predictor"] for row in json.loads((workdir / "preferences.json").read_text())]
  assert predictors == ["head", "frequencies", "labels averaged", "labels hidden", "majority"]


def test_the_same_study_again_gives_the_same_results_and_may_measure_otherwise(finished):
  config, workdir, results = finished
  config = config.copy_and_resolve_references()
  config.study.few_acts_pairs = 2
  found = study.run_study(config, workdir)
  full = [row for row in results if not row["condition"].endswith("acts")]
  assert [row for row in found if row["examples"] > 2] == full


def test_the_page_reads_adds_to_and_steers_a_users_preferences(finished, capsys):
  _, workdir, _ = finished
  (code,) = shown_on_pages(r"from alignx_jax\.preference_model import")
  names = {}
  exec(code.replace("runs/study", str(workdir)), names)
  assert names["steered"]["Likes photography"] == 1.0
  assert names["steered"]["Likes music"] >= 0.5
  printed = capsys.readouterr().out.strip().splitlines()
  assert len(printed) > 10 and "%" in printed[1]
