"""The audit of a trained run, from its workdir to the page; on a tiny model."""

import json

import pytest

from alignx_jax.evaluation import bias, counterfactual, leakage
from alignx_jax.experiments import audit
from alignx_jax.experiments import experiment as experiments
from configs import study_simulated

pytestmark = pytest.mark.long


@pytest.fixture(scope="module", params=["ica", "pba_head"])
def run(request, tmp_path_factory):
  """A run of one step on simulated users who state age and gender."""
  config = study_simulated.get_config()
  config.model.weights = "preset:tiny"
  config.data.update(train_records=4, validation_records=4, test_records=10, demographics=0.0)
  config.regions.update(context=2048, response=256, examples=1)
  config.regions.update(prompt=256, persona=1536, parts=14)
  config.train.update(rows=2, devices=1, steps=1)
  config.eval.rows = 2
  if request.param == "pba_head":
    config.objective.name, config.bridge.kind = "pba", "head"
  workdir = tmp_path_factory.mktemp("run")
  experiments.run_training(experiments.load_experiment(config), workdir)
  return request.param, config, workdir


def test_a_run_is_audited(run, monkeypatch):
  name, config, workdir = run
  for module in (bias, counterfactual, leakage, audit):  # few are enough
    monkeypatch.setattr(module, "LEAST_PAIRS", 3)
    monkeypatch.setattr(module, "LEAST_POSTS", 2, raising=False)
  config.eval.rows = 1  # how it is audited may differ from how it was trained
  told = audit.run_audit(config, workdir, dimensions=["Likes music"], command="audit")
  found = json.loads((workdir / "bias.json").read_text(encoding="utf-8"))
  assert (found["policy"], found["examples"]) == (name, 10)
  genders = {r["group"]: r for r in found["groups"] if r["attribute"] == "gender"}
  assert genders.keys() <= {"female", "male"} and sum(r["examples"] for r in genders.values()) == 10
  # What groups say adds up to what all say.
  for key in ("accuracy", "margin"):
    assert all(row[key] is not None for row in genders.values()), "another seed, please"
  right = sum(row["accuracy"] * row["examples"] for row in genders.values())
  assert right == pytest.approx(10 * found["accuracy"])
  assert any(row["attribute"] == "Likes music" for row in found["groups"])
  swaps = [r for r in found["counterfactual"] if r["attribute"] == "gender"]
  assert sum(row["examples"] for row in swaps) == 10
  # It was read. What a head of one step makes of it is too little for its policy's margins.
  read = "variation" if name == "pba_head" else "absolute"
  assert all(row[read] > 0 for row in swaps)
  assert all(("variation" in row) == (name == "pba_head") for row in swaps)
  predictors = {row["predictor"] for row in found["leakage"]}
  assert ("head" in predictors) == (name == "pba_head") and "golden" in predictors
  page = (workdir / "bias.html").read_text(encoding="utf-8")
  for word in ("By group", "female", "Likes music", "Another age or gender stated"):
    assert word in told and word in page
  assert told.startswith(f"{name} of {workdir}: ")


@pytest.mark.parametrize("run", ["ica"], indirect=True)  # once is enough
def test_too_few_are_said_to_be_too_few(run):
  _, config, workdir = run
  told = audit.run_audit(config, workdir)
  assert "too few to say" in told and "No two groups are large enough." in told
  assert "Of 90 dimensions 90 have too few holders" in told
  with pytest.raises(ValueError, match="no pole"):
    audit.audit(config, workdir, dimensions=["Likes nothing at all"])
