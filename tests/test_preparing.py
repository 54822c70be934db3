"""Published files to a prepared set: nothing is lost, refused silently or left half done."""

import collections
import contextlib
import functools
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from alignx_jax.data import preparing
from alignx_jax.data.alignx import CONFIGS, TRAIN_SOURCES, get_config
from alignx_jax.data.data_card import format_card
from alignx_jax.data.prepared import open_prepared
from alignx_jax.data.preparing import prepare, run_in_processes, run_on_beam
from alignx_jax.data.records import RecordError, parse_record, read_examples
from alignx_jax.personas.preferences import alignx_space
from alignx_jax.personas.simulator import TALKATIVE, simulate_record

HERE = functools.partial(run_in_processes, workers=1)
HISTORY, PAIRS = "User-Generated Content", "Pair-wise Comparative Feedback"
DEMO = "Demographic Information"


def records(count, start=0):
  return [simulate_record(i, split="train", seed=1) for i in range(start, start + count)]


def write_json(path, values):
  path.write_text(json.dumps(values), encoding="utf-8")
  return str(path)


def contents(directory):
  """{file: hash} of all that a directory holds."""
  return {
    str(path.relative_to(directory)): hashlib.sha256(path.read_bytes()).hexdigest()
    for path in Path(directory).rglob("*")
    if path.is_file()
  }


def quarantine(directory):
  lines = (Path(directory) / "quarantine.jsonl").read_text(encoding="utf-8").splitlines()
  return [json.loads(line) for line in lines]


def same(a, b):
  return repr(a) == repr(b)


def test_p_soups_gives_600_records_and_refuses_none(p_soups, tmp_path):
  card = prepare([str(p_soups)], tmp_path / "out", get_config("p_soups"), run_all=HERE)
  assert (card["records"], card["refused"], card["splits"]) == (600, 0, {"test": 600})
  read = open_prepared(tmp_path / "out")["test"]
  assert all(map(same, read, read_examples(p_soups, alignx_space())))
  assert "600 records, 0 refused" in format_card(card)


def test_what_is_read_is_what_was_written_in_either_form(tmp_path):
  values = records(30)
  values[3][PAIRS] = None
  del values[4][PAIRS]
  del values[5][DEMO]
  values[6]["profile"] = "Likes anime"
  for item in values[7][PAIRS]:
    del item["Preference Direction"]
  values[8]["Preference Direction"] = None
  table = pa.Table.from_pylist([{"profile": None} | value for value in values])
  pq.write_table(table, tmp_path / "a.parquet", row_group_size=7)
  write_json(tmp_path / "a.json", values)
  expected = [parse_record(v, alignx_space(), "") for v in values]
  for file in ("a.parquet", "a.json"):
    out = tmp_path / f"{file}.out"
    card = prepare(
      [str(tmp_path / file)], out, get_config("test_ugc"), shard_records=8, run_all=HERE
    )
    assert card["refused"] == 0
    read = open_prepared(str(out))["test"]
    assert [e.id for e in read] == [f"{file}:{i}" for i in range(30)]
    for example, value in zip(read, expected, strict=True):
      assert same({**vars(example), "id": ""}, vars(value))


def faults():
  """(name of the fault, field that the refusal names, record)."""
  base = records(40, start=100)

  def changed(i, **fields):
    return base[i] | fields

  def item(i, field, index, **fields):
    items = [dict(x) for x in base[i][field]]
    items[index] |= fields
    return base[i] | {field: items}

  def without(i, field):
    return {k: v for k, v in base[i].items() if k != field}

  direction = "Preference Direction"
  comment = f"{HISTORY}[0]."
  pair = f"{PAIRS}[0]."
  return [
    ("missing prompt", "prompt", without(0, "prompt")),
    ("missing chosen", "chosen", without(1, "chosen")),
    ("missing rejected", "rejected", without(2, "rejected")),
    ("null chosen", "chosen", changed(3, chosen=None)),
    ("number for text", "rejected", changed(4, rejected=7)),
    ("list for text", "prompt", changed(5, prompt=["a"])),
    ("empty response", "chosen", changed(6, chosen="")),
    ("blank response", "rejected", changed(7, rejected=" \n")),
    ("blank post", "prompt", changed(8, prompt="\t")),
    ("half a surrogate", "chosen", changed(9, chosen="a\ud800b")),
    ("number for a description", DEMO, changed(10, **{DEMO: 3})),
    ("number for a profile", "profile", changed(11, profile=0)),
    ("text for a history", HISTORY, changed(12, **{HISTORY: "none"})),
    ("object for pairs", PAIRS, changed(13, **{PAIRS: {"prompt": "x"}})),
    ("text for an item", f"{HISTORY}[0]", changed(14, **{HISTORY: ["x"]})),
    ("null item", f"{PAIRS}[0]", changed(15, **{PAIRS: [None]})),
    ("item without a comment", comment + "comment", changed(16, **{HISTORY: [{"prompt": "x"}]})),
    ("item with a null post", comment + "prompt", item(17, HISTORY, 0, prompt=None)),
    ("pair with an empty response", pair + "rejected", item(18, PAIRS, 0, rejected="")),
    ("89 directions", direction, changed(19, **{direction: [0.5] * 89})),
    ("direction of 0.7", direction, changed(20, **{direction: [0.7] + [0.5] * 89})),
    ("direction of 2", pair + direction, item(21, PAIRS, 0, **{direction: [2] * 90})),
    ("null direction", comment + direction, item(22, HISTORY, 0, **{direction: [None] * 90})),
    ("NaN direction", direction, changed(23, **{direction: [float("nan")] * 90})),
    ("true direction", direction, changed(24, **{direction: [True] * 90})),
    ("text for directions", direction, changed(25, **{direction: "likes all"})),
    ("17 history items", "history", changed(26, **{HISTORY: base[26][HISTORY][:1] * 17})),
    ("no persona", "history", changed(27, **{HISTORY: [], PAIRS: None, DEMO: ""})),
    ("a megabyte", "prompt", changed(28, prompt="long " * 200_000)),
    ("a record that is no object", "", [1, 2]),
  ]  # fmt: skip


def planted(tmp_path):
  """A file of 100 good records and 30 bad ones; {row: fault}."""
  rows = [(None, None, record) for record in records(100)] + faults()
  random.Random(0).shuffle(rows)
  path = write_json(tmp_path / "planted.json", [record for *_, record in rows])
  return path, {i: (name, field) for i, (name, field, _) in enumerate(rows) if name}


def test_of_30_planted_faults_exactly_those_are_quarantined_by_name(tmp_path):
  path, bad = planted(tmp_path)
  out = tmp_path / "out"
  card = prepare([path], out, get_config("test_pair"), shard_records=32, run_all=HERE)
  assert (card["records"], card["refused"]) == (100, 30)
  refused = quarantine(out)
  assert {r["row"]: r["field"] for r in refused} == {row: field for row, (_, field) in bad.items()}
  assert all(r["file"] == path and r["reason"].strip() and r["rows"] == 1 for r in refused)
  ids = [example.id for example in open_prepared(out)["test"]]
  assert ids == [f"planted.json:{i}" for i in range(130) if i not in bad]
  assert sum(card["refused_by_reason"].values()) == 30
  assert "30 refused" in format_card(card)


def test_strict_stops_at_the_first_and_a_run_without_goes_on(tmp_path):
  path, bad = planted(tmp_path)
  out = tmp_path / "out"
  with pytest.raises(RecordError, match=rf"planted\.json:{min(bad)}"):
    prepare([path], out, get_config("test_pair"), strict=True, run_all=HERE)
  assert not out.exists()
  assert prepare([path], out, get_config("test_pair"), run_all=HERE)["refused"] == 30


def test_duplicates_are_refused_wherever_they_stand(tmp_path):
  values = records(20)
  again = [values[3], *records(5, start=50), values[17], values[3]]
  files = [write_json(tmp_path / "a.json", values), write_json(tmp_path / "b.json", again)]
  card = prepare(files, tmp_path / "out", get_config("test_pair"), shard_records=8, run_all=HERE)
  assert (card["records"], card["refused"]) == (25, 3)
  assert [(r["file"], r["row"]) for r in quarantine(tmp_path / "out")] == [
    (files[1], 0),
    (files[1], 6),
    (files[1], 7),
  ]
  ids = [e.id for e in open_prepared(tmp_path / "out")["test"]]
  assert ids == [f"a.json:{i}" for i in range(20)] + [f"b.json:{i}" for i in range(1, 6)]


def test_a_damaged_file_costs_only_what_is_damaged(tmp_path):
  text = json.dumps(records(20))
  (tmp_path / "cut.json").write_text(text[: len(text) // 2])
  (tmp_path / "no.parquet").write_text("PAR1 and nothing else")
  files = [str(tmp_path / name) for name in ("cut.json", "no.parquet")]
  files.append(write_json(tmp_path / "whole.json", records(5, start=30)))
  card = prepare(files, tmp_path / "out", get_config("test_pair"), run_all=HERE)
  kept = [e.id for e in open_prepared(tmp_path / "out")["test"]]
  assert card["damaged_files"] == sorted(files[:2])
  assert len(kept) == card["records"] and kept[-5:] == [f"whole.json:{i}" for i in range(5)]
  assert kept[:-5] == [f"cut.json:{i}" for i in range(len(kept) - 5)]
  cut, no = (r for r in quarantine(tmp_path / "out"))
  assert cut["row"] == len(kept) - 5 and "ends inside a record" in cut["reason"]
  assert "not parquet" in no["reason"]


def test_a_parquet_file_without_a_column_is_refused_row_by_row(tmp_path):
  table = pa.Table.from_pylist(records(6)).drop_columns(["chosen"])
  pq.write_table(table, tmp_path / "a.parquet")
  card = prepare([str(tmp_path / "a.parquet")], tmp_path / "out", get_config("train"), run_all=HERE)
  assert (card["records"], card["refused"]) == (0, 6)
  assert card["refused_by_reason"] == {"chosen is missing; add it.": 6}


def test_one_users_records_are_all_of_one_split(tmp_path):
  values = []
  for i, record in enumerate(records(60)):
    values += [record, record | {"prompt": "Another post?"}]
    values[-1][HISTORY] = record[HISTORY][::-1]  # the same persona in another order
    values += [records(1, start=500 + i)[0] | {"user": f"u{i % 10}"}]
  path = write_json(tmp_path / "a.json", values)
  config = get_config("train", validation_share=0.3)
  card = prepare([path], tmp_path / "out", config, shard_records=50, run_all=HERE)
  splits = open_prepared(tmp_path / "out")
  assert sum(card["splits"].values()) == 180 and min(card["splits"].values()) > 30
  of = {e.id: name for name, examples in splits.items() for e in examples}
  by_user = collections.defaultdict(set)
  for i in range(180):
    by_user[i // 3 if i % 3 < 2 else f"u{(i // 3) % 10}"].add(of[f"a.json:{i}"])
  assert all(len(names) == 1 for names in by_user.values())
  other = get_config("train", validation_share=0.3, seed=1)
  prepare([path], tmp_path / "other", other, shard_records=50, run_all=HERE)
  held = [{e.id for e in open_prepared(tmp_path / d)["validation"]} for d in ("out", "other")]
  assert held[0] != held[1]


def test_the_sample_is_exact_and_seeded(tmp_path):
  path = write_json(tmp_path / "a.json", records(300))
  config = get_config("train_7_percent", validation_share=0.2)
  card = prepare([path], tmp_path / "out", config, shard_records=64, run_all=HERE)
  assert card["records"] == round(300 * 91_918 / 1_311_622) == 21
  whole = get_config("train", validation_share=0.2)
  prepare([path], tmp_path / "whole", whole, shard_records=64, run_all=HERE)
  for split, examples in open_prepared(tmp_path / "out").items():
    ids = {e.id for e in open_prepared(tmp_path / "whole")[split]}
    assert ids >= {e.id for e in examples}  # a record is of the same split in both


def test_sources_come_from_the_field_or_the_file(tmp_path):
  values = records(6)
  for value in values[:2]:
    value["source"] = "PKU-SafeRLHF"
  path = write_json(tmp_path / "Reddit.json", values)
  card = prepare([path], tmp_path / "out", get_config("test_pair"), run_all=HERE)
  assert card["sources"] == {"PKU-SafeRLHF": 2, "Reddit": 4}
  by_source = open_prepared(tmp_path / "out")["test"].by_source()
  assert {k: v.tolist() for k, v in by_source.items()} == {
    "PKU-SafeRLHF": [0, 1],
    "Reddit": [2, 3, 4, 5],
  }


def test_simulated_users_are_the_simulators(tmp_path):
  config = get_config("simulated", seed=3)
  counts = {"train": 20, "validation": 3, "test": 5}
  card = prepare([], tmp_path / "out", config, simulated=counts, shard_records=8, run_all=HERE)
  assert card["splits"] == counts and card["sources"] == {"simulated": 28}
  for split, examples in open_prepared(tmp_path / "out").items():
    for i, example in enumerate(examples):
      record = simulate_record(i, split=split, seed=3, config=TALKATIVE)
      assert same(example, parse_record(record, alignx_space(), example.id))


def test_the_card_counts_what_is_there(tmp_path):
  values = records(12)
  path = write_json(tmp_path / "a.json", values)
  card = prepare([path], tmp_path / "out", get_config("test_pair"), run_all=HERE)
  directions = np.array([value["Preference Direction"] for value in values])
  assert card["neutral_share"] == pytest.approx((directions == 0.5).mean())
  counts = list(card["dimensions"].values())
  assert [c["positive"] for c in counts] == (directions == 1).sum(axis=0).tolist()
  assert [c["negative"] for c in counts] == (directions == 0).sum(axis=0).tolist()
  chosen = [len(value["chosen"]) for value in values]
  assert card["percentiles"]["chosen"]["50"] == pytest.approx(np.percentile(chosen, 50))


def test_names_are_those_of_the_paper_with_their_numbers():
  assert [config.name for config in CONFIGS] == [
    *("train", "train_7_percent", "test_ugc", "test_pair", "test_demo", "test_arbitrary"),
    *("test_history16", "p_soups", "prism", "uf_p_4", "simulated"),
  ]
  assert sum(TRAIN_SOURCES.values()) == 1_311_622
  assert len(get_config("uf_p_4").space) == 4
  with pytest.raises(ValueError, match="No data set 'trian'; set config.name to one of train,"):
    get_config("trian")


# ------------------------------------------------------------------ again, and elsewhere


class Cut(BaseException):
  """What stands for a kill."""


def input_files(tmp_path):
  path, _ = planted(tmp_path)
  values = records(30, start=200)
  return [path, write_json(tmp_path / "more.json", [*values, *values[4:6]])]


def prepare_some(files, out):
  return prepare(
    files, out, get_config("train", validation_share=0.2), shard_records=40, run_all=HERE
  )


@pytest.mark.slow
def test_cut_off_at_any_write_the_same_call_again_gives_the_same(tmp_path, monkeypatch):
  files = input_files(tmp_path)
  prepare_some(files, tmp_path / "whole")
  expected = contents(tmp_path / "whole")
  replace = os.replace
  done = 0
  for cut in range(1, 100):
    out = tmp_path / f"out{cut}"
    count = 0

    def replace_or_die(source, target, at=cut):
      nonlocal count
      count += 1
      if count == at:
        raise Cut
      replace(source, target)

    with monkeypatch.context() as patch:
      patch.setattr(preparing.os, "replace", replace_or_die)
      try:
        prepare_some(files, out)
        break  # all writes have had their turn
      except Cut:
        assert not out.exists()
        done += 1
    prepare_some(files, out)
    assert contents(out) == expected
  assert done > 20


@pytest.mark.slow
@pytest.mark.parametrize("kills", [3, pytest.param(20, marks=pytest.mark.slow)])
def test_killed_at_random_moments_the_result_is_that_of_an_undisturbed_run(tmp_path, kills):
  files = input_files(tmp_path)
  prepare_some(files, tmp_path / "whole")
  out = tmp_path / "out"
  code = (
    "import sys; from alignx_jax.data.preparing import *; from alignx_jax.data.alignx import *\n"
    "config = get_config('train', validation_share=0.2)\n"
    "if __name__ == '__main__':\n"
    "  print('ready', flush=True)\n"
    "  prepare(sys.argv[2:], sys.argv[1], config, shard_records=40)\n"
  )
  script = tmp_path / "script.py"
  script.write_text(code)
  command = [sys.executable, str(script), str(out), *files]
  rng = random.Random(kills)
  for _ in range(kills):
    process = subprocess.Popen(
      command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, start_new_session=True
    )
    process.stdout.readline()
    time.sleep(rng.uniform(0.0, 1.0))
    with contextlib.suppress(ProcessLookupError):
      os.killpg(process.pid, signal.SIGKILL)
    process.wait()
  subprocess.run(command, check=True, capture_output=True)
  assert contents(out) == contents(tmp_path / "whole")


def test_a_finished_set_is_only_read_and_other_settings_are_refused(tmp_path, monkeypatch):
  files = input_files(tmp_path)
  card = prepare_some(files, tmp_path / "out")
  monkeypatch.setattr(preparing, "run_job", None)
  assert prepare_some(files, tmp_path / "out") == json.loads(json.dumps(card))
  with pytest.raises(ValueError, match=r"prepared with other settings \(seed\); use another"):
    config = get_config("train", validation_share=0.2, seed=5)
    prepare(files, tmp_path / "out", config, shard_records=40)
  with pytest.raises(ValueError, match=r"prepared with other files"):
    prepare_some(files[:1], tmp_path / "out")


def test_workers_and_beam_write_the_same(tmp_path):
  files = input_files(tmp_path)
  prepare_some(files, tmp_path / "here")
  config = get_config("train", validation_share=0.2)
  two = functools.partial(run_in_processes, workers=2)
  prepare(files, tmp_path / "two", config, shard_records=40, run_all=two)
  assert contents(tmp_path / "two") == contents(tmp_path / "here")
  prepare(files, tmp_path / "beam", config, shard_records=40, run_all=run_on_beam)
  assert contents(tmp_path / "beam") == contents(tmp_path / "here")


def test_it_may_be_written_to_an_object_store(tmp_path):
  import fsspec

  files = input_files(tmp_path)
  prepare_some(files, tmp_path / "here")
  prepare_some(files, "memory://bucket/set")
  fs, _ = fsspec.url_to_fs("memory://bucket/set")
  found = {
    path.removeprefix("/bucket/set/"): hashlib.sha256(fs.cat_file(path)).hexdigest()
    for path in fs.find("/bucket/set")
  }
  assert found == contents(tmp_path / "here")


def test_a_full_disk_leaves_nothing_half_done(tmp_path):
  """A limit on file sizes stands for a full disk."""
  files = input_files(tmp_path)
  prepare_some(files, tmp_path / "whole")
  code = (
    "import sys, resource; from alignx_jax.data.preparing import *\n"
    "from alignx_jax.data.alignx import *\n"
    "resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, resource.RLIM_INFINITY))\n"
    "config = get_config('train', validation_share=0.2)\n"
    "here = lambda jobs: run_in_processes(jobs, workers=1)\n"
    "prepare(sys.argv[2:], sys.argv[1], config, shard_records=40, run_all=here)\n"
  )
  command = [sys.executable, "-c", code, str(tmp_path / "out"), *files]
  failed = subprocess.run(command, capture_output=True, text=True)
  assert failed.returncode != 0 and not (tmp_path / "out").exists()
  assert "File too large" in failed.stderr or "ResourceExhausted" in failed.stderr, failed.stderr
  prepare_some(files, tmp_path / "out")
  assert contents(tmp_path / "out") == contents(tmp_path / "whole")
