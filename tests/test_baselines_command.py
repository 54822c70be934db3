"""All baselines on a tiny model: every row of the one table, and what it says of them."""

import json

import pytest

from alignx_jax.evaluation.results import LEGEND, format_policies
from alignx_jax.experiments import baselines
from configs import baselines_simulated

pytestmark = pytest.mark.slow


def test_every_baseline_is_measured_with_its_controls_beside_the_others(tmp_path):
  config = baselines_simulated.get_config()
  config.model.weights = "preset:tiny"
  config.data.update(train_records=4, validation_records=4, test_records=4)
  config.regions.update(context=2048, response=256, examples=2)
  config.regions.update(prompt=256, persona=1024, parts=16)
  config.train.update(rows=2, devices=1, steps=1)
  config.latent.size = 3
  with config.unlocked():
    config.baselines = {name: {} for name in baselines.POLICIES}
  config.eval.rows = 2
  results, latents = baselines.run_baselines(config, tmp_path)
  assert json.loads((tmp_path / "results.json").read_text()) == results
  assert json.loads((tmp_path / "latent.json").read_text()) == latents
  assert len(latents) == 3
  assert [(r["policy"], r["condition"], r["protocol"]) for r in results] == [
    ("length", "length", "none"),
    *(("base", condition, "unconditioned") for condition in ("persona", "pairs", "shuffled")),
    ("dpo", "none", "matched"),
    *(("pba", condition, "matched") for condition in ("inferred", "golden", "shuffled", "none")),
    *(("vpl", condition, "matched") for condition in ("inferred", "shuffled", "none")),
  ]
  assert {r["examples"] for r in results} == {4}
  for name in baselines.POLICIES:
    saved = json.loads((tmp_path / name / "config.json").read_text())
    assert saved["objective"]["name"] == name


def test_the_policies_of_a_table_are_told_by_their_usual_names():
  told = format_policies([{"policy": policy} for policy in ("base", "dpo", "pba", "vpl", "dpo")])
  lines = told.splitlines()
  assert [line.split(":")[0] for line in lines] == ["base", "dpo", "pba", "vpl"]
  for line, name in zip(
    lines, ("few-shot prompting", "universal DPO", "label averaging", "variational"), strict=True
  ):
    assert name in line
  for condition in ("pairs", "inferred", "shuffled", "none"):
    assert LEGEND["condition"][condition]
