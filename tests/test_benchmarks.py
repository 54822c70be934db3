"""Policies on benchmarks: every pair told, what cannot be scored counted, and two runs compared."""

import dataclasses
import json
import subprocess
import sys

import numpy as np
import pytest

from alignx_jax.data.benchmarks import load_benchmark
from alignx_jax.data.formatting import tokenise
from alignx_jax.evaluation.accuracy import evaluate_policy
from alignx_jax.evaluation.comparison import compare_rows, format_comparisons, read_rows
from alignx_jax.evaluation.published import by_benchmark, format_benchmarks
from alignx_jax.evaluation.record_table import SCHEMA, read_table, row_groups, user_of
from alignx_jax.evaluation.results import percent
from alignx_jax.experiments import benchmarks, measuring
from alignx_jax.experiments import experiment as experiments
from alignx_jax.experiments.benchmarks import load_subject, run_benchmarks
from alignx_jax.experiments.export import export
from tests.small_records import small_config, small_record, write_small_records

RECORDS = 16


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
  return tmp_path_factory.mktemp("benchmarks")


@pytest.fixture(scope="module")
def published(directory):
  """Two benchmarks as they are published: a file, and a folder of two with bad records."""
  records = [small_record(i) for i in range(RECORDS)]
  del records[5]["Preference Direction"]  # no golden P̃
  records[7]["chosen"] = "fog " * 40  # longer than the region
  where = directory / "published"
  where.mkdir()
  (where / "test_ugc.json").write_text(json.dumps(records))
  (where / "Test-Pair").mkdir()
  pairs = [small_record(i) for i in range(4)]
  for i, record in enumerate(pairs):
    act = record.pop("User-Generated Content")[0]
    pair = {"prompt": "tea", "chosen": f"sun {i}", "rejected": "rain"}
    record["Pair-wise Comparative Feedback"] = [pair]
    record["Demographic Information"] = act["comment"]
  pairs[1]["Pair-wise Comparative Feedback"] = []
  pairs[2]["rejected"] = " "
  (where / "Test-Pair" / "a.json").write_text(json.dumps(pairs[:2]))
  (where / "Test-Pair" / "b.json").write_text(json.dumps(pairs[2:]))
  return where


@pytest.fixture(scope="module")
def config(directory):
  config = small_config(write_small_records(directory / "records.json"))
  config.train.steps = 2
  return config


def _trained(config, workdir):
  experiments.run_training(experiments.load_experiment(config), workdir)
  return workdir


@pytest.fixture(scope="module")
def ica(config, directory):
  return _trained(config, directory / "ica")


@pytest.fixture(scope="module")
def ica_results(config, ica, published):
  names = ["test_ugc", "test_pair"]
  return run_benchmarks(load_subject(config, ica), ica, names, str(published), command="as typed")


@pytest.fixture(scope="module")
def exported(config, ica, directory):
  export(config, ica, directory / "hf")
  return str(directory / "hf")


@pytest.fixture(scope="module")
def pba(config, exported, directory, published):
  """The same weights, told P̃ instead of the persona."""
  config = config.copy_and_resolve_references()
  config.objective.name = "pba"
  subject = load_subject(config, None, policy_weights=exported)
  run_benchmarks(subject, directory / "pba", ["test_ugc"], str(published))
  return directory / "pba"


def _rows(table):
  return {(r["policy"], r["condition"], r["protocol"]): columns for r, columns in row_groups(table)}


def test_a_pair_is_scored_as_an_evaluation_of_the_run_scores_it(config, ica, ica_results):
  table, about = read_table(ica / "benchmarks/test_ugc.parquet")
  assert table.schema.equals(SCHEMA, check_metadata=False) and about["policy"] == "ica"
  benchmark = load_benchmark("test_ugc", ica.parent / "published")
  experiment = experiments.load_experiment(config)
  experiment = dataclasses.replace(experiment, test=benchmark.examples)
  base = measuring.base_scorer(experiment)
  params = experiments.trained_params(experiments.load_experiment(config), ica)
  policy = measuring.policy_scorer(experiment, params, ica)
  expected = evaluate_policy("ica", policy, base)
  found = [row for row in ica_results[0] if row["benchmark"] == "test_ugc"]
  assert [row["policy"] for row in found] == ["length", "base"] + ["ica"] * 7
  for ours, theirs in zip(found[2:], expected, strict=True):
    for key in ("condition", "protocol", "accuracy", "examples", "posts", "refused"):
      assert ours[key] == theirs[key]
  one = [row for row in table.to_pylist() if row["protocol"] == "release"]
  one = [row for row in one if row["condition"] == "persona"]
  score_XN, reference_XN = policy.score("persona"), base.score("persona")
  for row, example, score_N, reference_N in zip(
    one, benchmark.examples, score_XN, reference_XN, strict=True
  ):
    assert (row["id"], row["user"]) == (example.id, user_of(example.persona))
    formatting = dataclasses.replace(
      experiment.formatting,
      regions=dataclasses.replace(experiment.formatting.regions, response=999),
    )
    ids = tokenise(example, formatting, example.persona)
    lengths = len(ids.chosen), len(ids.rejected), len(example.chosen), len(example.rejected)
    names = ("chosen_tokens", "rejected_tokens", "chosen_characters", "rejected_characters")
    assert tuple(row[name] for name in names) == lengths
    if not np.isfinite(score_N).all():
      assert row["margin"] is row["correct"] is row["policy_chosen"] is None
      assert row["unscored"] == "response longer than its region"
      continue
    scores = np.concatenate([score_N, reference_N])
    np.testing.assert_array_equal([row[name] for name in SCHEMA.names[7:11]], scores)
    assert row["margin"] == pytest.approx(
      float(scores[[0, 3]].sum() - scores[[1, 2]].sum()), abs=1e-3
    )
    assert row["correct"] == float(row["margin"] > 0) and row["unscored"] is None


def test_nothing_that_users_wrote_is_in_the_table(ica, ica_results):
  table = read_table(ica / "benchmarks/test_ugc.parquet")[0].to_pylist()
  said = {word for row in table for v in row.values() for word in str(v).replace(":", " ").split()}
  assert not said & {"sun", "rain", "tea", "fog", "oak"}
  assert len({row["id"] for row in table}) == RECORDS
  acts = [small_record(i)["User-Generated Content"][0] for i in range(RECORDS)]
  personas = {(act["prompt"], act["comment"]) for act in acts}
  assert len({row["user"] for row in table}) == len(personas)
  assert len({row["post"] for row in table}) == 12  # of small_record


def test_what_cannot_be_scored_is_told_record_by_record_and_counted(ica, ica_results, pba):
  results, told = ica_results
  lines = (ica / "benchmarks/test_pair.unusable.jsonl").read_text().splitlines()
  assert [json.loads(line) for line in lines] == [
    {
      "where": "b.json:0",
      "field": "rejected",
      "reason": "is empty; drop the record or fill it in.",
    },
    {
      "where": "a.json:1",
      "field": "Pair-wise Comparative Feedback",
      "reason": "is missing or empty, and test_pair is of users by it; add it.",
    },
  ]
  assert any("1 not usable, the first a.json:1: field 'Pair-wise" in t for t in told["test_pair"])
  assert {row["examples"] for row in results if row["benchmark"] == "test_pair"} == {2}
  counted = [row for row in results if row["benchmark"] == "test_ugc" and row["policy"] == "ica"]
  assert {(row["examples"], row["refused"]) for row in counted} == {(RECORDS - 1, 1)}
  row = "test_ugc: ica, persona, matched/release/unconditioned"
  assert f"{row}: 1 not scored: response longer than its region" in told["test_ugc"]
  golden = _rows(read_table(pba / "benchmarks/test_ugc.parquet")[0])["pba", "golden", "matched"]
  at = list(golden["id"]).index("test_ugc.json:5")
  assert np.isnan(golden["correct"][at]) and golden["unscored"][at].startswith("no golden P̃")
  assert np.isnan(golden["correct"]).sum() == 2


def test_the_same_command_again_measures_nothing_and_says_the_same(
  config, ica, ica_results, published, monkeypatch, capsys
):
  def never(*_, **__):
    raise AssertionError("scored again")

  with monkeypatch.context() as patch:
    patch.setattr(benchmarks, "_comparisons", never)
    again = run_benchmarks(load_subject(config, ica), ica, ["test_pair"], str(published))[0]
    assert again == [row for row in ica_results[0] if row["benchmark"] == "test_pair"]
    changed = config.copy_and_resolve_references()
    changed.eval.protocols = ("matched",)
    with pytest.raises(AssertionError, match="scored again"):
      run_benchmarks(load_subject(changed, ica), ica, ["test_pair"], str(published))
  (ica / "benchmarks/damaged.parquet").write_bytes(b"PAR1")
  with pytest.raises(ValueError, match="damaged.parquet is no table of an evaluation, or damaged"):
    read_table(ica / "benchmarks/damaged.parquet")
  (ica / "benchmarks/damaged.parquet").unlink()


def test_a_hugging_face_directory_is_scored_as_the_run_that_it_is_of(
  config, ica, ica_results, exported, published, directory
):
  subject = load_subject(config, None, policy_weights=exported)
  run_benchmarks(subject, directory / "of_hf", ["test_ugc"], str(published))
  ours, theirs = (
    read_table(where / "benchmarks/test_ugc.parquet")[0] for where in (ica, directory / "of_hf")
  )
  assert ours.equals(theirs)


def test_a_policy_of_another_vocabulary_is_refused(config):
  with pytest.raises(ValueError, match="simulated_base was made for other tokens than preset:tiny"):
    load_subject(config, None, policy_weights="package:alignx_jax/models/simulated_base")


def test_the_base_alone_is_scored_without_a_run(config, directory, published, ica_results):
  results, _ = run_benchmarks(
    load_subject(config, None), directory / "base", ["test_ugc"], str(published)
  )
  found = [(row["policy"], row["condition"]) for row in results]
  assert found == [("length", "length"), *(("base", c) for c in ("persona", "inferred", "golden"))]
  of_run = [row for row in ica_results[0] if row["benchmark"] == "test_ugc"]
  assert results[:2] == of_run[:2]


def test_two_runs_are_compared_on_the_pairs_that_both_have(ica, ica_results, pba):
  first, second = read_rows(ica), read_rows(pba)
  choices = {"policy": ("ica", "pba"), "condition": ("persona", "inferred")}
  found = compare_rows(first, second, **choices, protocol=("matched", "matched"))
  assert [one["pairs"] for one in found] == [RECORDS - 1]
  one = found[0]
  assert one["difference"] == pytest.approx(one["second"] - one["first"])
  assert one["first_only"] + one["second_only"] >= abs(round(one["difference"] * 15))
  text = format_comparisons(found)
  assert "ica persona matched" in text and "1 not scored" in text
  alone = compare_rows(first, read_rows(ica / "benchmarks/test_ugc.parquet"))
  assert {one["p"] for one in alone} == {1.0} and len(alone) == 9
  with pytest.raises(ValueError, match="No two figures go together. The first has: test_pair len"):
    compare_rows(first, second, policy=("ica", "pbq"))


def test_published_figures_stand_beside_the_row_that_they_are_of(ica_results):
  result = dict(ica_results[0][-1]) | {"benchmark": "p_soups"}
  label = lambda *labels: (
    result | dict(zip(("policy", "condition", "protocol"), labels, strict=True))
  )
  rows = [label("pba", "inferred", p) for p in ("matched", "release")]
  rows += [label("pba_head", "inferred", "release"), label("pba", "golden", "release")]
  rows.append(label("pba", "golden", "release") | {"benchmark": "test_demo"})
  found = [row["published"] for group in by_benchmark(rows).values() for row in group]
  assert found == ["–", "81.69", "–", "–", "91.36"]
  text = format_benchmarks(rows)
  assert "published % (8B models)" in text and "arXiv 2503.15463, Table 3" in text


def test_the_page_has_every_figure_and_what_reproduces_it(config, ica, ica_results, published):
  names = ["test_ugc", "test_pair"]  # again: another test's run wrote the page since
  run_benchmarks(load_subject(config, ica), ica, names, str(published), command="as typed")
  text = (ica / "benchmarks/report.html").read_text(encoding="utf-8")
  for row in ica_results[0]:
    assert f"<b>{percent(row)}</b>" in text, row
  for expected in ("as typed", "pyarrow", "published % (8B models)", "not scored", "default-src"):
    assert expected in text


def test_real_p_soups_records_are_read_as_they_are_published(p_soups):
  benchmark = load_benchmark("p_soups", p_soups.parents[1])
  assert len(benchmark.examples) == 600 and not benchmark.unusable
  assert benchmark.examples[0].id == "friendly_unfriendly.json:0"


def test_a_benchmark_that_is_not_there_is_told_with_what_to_do(published):
  with pytest.raises(FileNotFoundError, match="has no prism.json, prism.parquet, nor prism/"):
    load_benchmark("prism", published)
  with pytest.raises(ValueError, match="No benchmark 'psoups'; set --benchmarks to some of "):
    load_benchmark("psoups", published)


def test_a_person_compares_at_a_terminal(ica, ica_results, pba):
  command = [sys.executable, "-m", "alignx_jax.compare", f"--first={ica}", f"--second={pba}"]
  done = subprocess.run([*command, "--policy=ica,pba", "--condition=none"], **_OPTIONS)
  assert done.returncode == 0, done.stderr
  assert "| test_ugc " in done.stdout and "ica none matched" in done.stdout
  done = subprocess.run([*command[:3], "--help"], **_OPTIONS)
  assert "--first" in done.stdout and "--workdir" not in done.stdout
  done = subprocess.run([*command, "--policy=ica,pba,x"], **_OPTIONS)
  assert done.stderr.strip() == "Error: --policy has 3 values; give one, or FIRST,SECOND."


_OPTIONS = {"capture_output": True, "text": True, "timeout": 60}
