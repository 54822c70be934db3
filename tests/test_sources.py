"""Published files, read in parts: every record comes out once, or is refused by name."""

import io
import json
import random

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from alignx_jax.data import sources
from alignx_jax.data.sources import Refusal, elements, find_files, find_parts, read_part

ODD = [
  {"a": 'brackets ]}[{, and \\" "quotes"', "b": [1, [2, {"c": None}]]},
  {"é": "日本語 🎈 \\"},
  {},
]


def records(count):
  return [{"prompt": f"post {i}?", "items": [{"n": i}] * (i % 3), "odd": ODD} for i in range(count)]


def read(parts):
  return [item for part in parts for item in read_part(part)]


@pytest.mark.parametrize("indent", [None, 2])
@pytest.mark.parametrize("block", [1, 7, 1 << 20])
def test_elements_are_those_of_a_json_parser(monkeypatch, indent, block):
  monkeypatch.setattr(sources, "_BLOCK", block)
  values = [*records(7), *ODD, [1, 2], []]
  text = json.dumps(values, indent=indent).encode()
  assert [json.loads(text[a:b]) for a, b in elements(io.BytesIO(text))] == values


def test_elements_that_are_no_objects_come_out_too():
  values = [1, {"a": 2}, "x, ]y", None, [3], True]
  text = json.dumps(values).encode()
  assert [json.loads(text[a:b]) for a, b in elements(io.BytesIO(text))] == values


def test_a_list_cut_anywhere_gives_its_whole_records_and_says_so():
  values = records(5)
  text = json.dumps(values).encode()
  for cut in random.Random(0).sample(range(1, len(text)), 200):
    *spans, last = elements(io.BytesIO(text[:cut]))
    found = [json.loads(text[a:b]) for a, b in spans]
    assert found == values[: len(found)]
    assert isinstance(last, str) and "fetch the file again" in last
    assert cut < len(json.dumps(values[: len(found) + 1])) + 1  # no whole record is missing


@pytest.mark.parametrize("rows", [1, 4, 100])
def test_parts_of_a_json_list_hold_each_record_once(tmp_path, rows):
  path = tmp_path / "some.json"
  path.write_text(json.dumps(records(10), ensure_ascii=False), encoding="utf-8")
  parts, refusals = find_parts(str(path), rows=rows)
  assert not refusals and sum(part.rows for part in parts) == 10
  assert [part.row for part in parts] == list(range(0, 10, rows))
  assert read(parts) == list(enumerate(records(10)))


def test_damage_in_a_json_list_costs_no_other_record(tmp_path):
  path = tmp_path / "some.json"
  good = [json.dumps(record).encode() for record in records(6)]
  good[2] = b'{"prompt": nope}'
  good[4] = good[4].replace(b"post 4", b"post \xff")
  path.write_bytes(b"[" + b",\n".join(good[:5]) + b", " + good[5][:30])
  parts, (cut,) = find_parts(str(path), rows=3)
  first, second, bad, third, invalid = read(parts)
  assert [first, second, third] == [(i, records(6)[i]) for i in (0, 1, 3)]
  assert bad.row == 2 and "is not JSON" in bad.reason
  assert invalid[1]["prompt"] == "post \udcff?"  # what validation refuses, naming the field
  assert cut.row == 5 and "ends inside a record" in cut.reason


@pytest.mark.parametrize("text", ['{"a": [1]}', "", "   ", "nonsense"])
def test_what_is_no_json_list_is_refused(tmp_path, text):
  path = tmp_path / "some.json"
  path.write_text(text)
  parts, (refusal,) = find_parts(str(path), rows=3)
  assert parts == [] and refusal.file == str(path)


def write_parquet(path, values, *, group=4, **options):
  pq.write_table(pa.Table.from_pylist(values), path, row_group_size=group, **options)


@pytest.mark.parametrize("rows", [1, 6, 100])
def test_parts_of_parquet_hold_each_record_once(tmp_path, rows):
  values = [{"prompt": f"post {i}?", "items": [{"n": i}]} for i in range(10)]
  write_parquet(tmp_path / "some.parquet", values)
  parts, refusals = find_parts(str(tmp_path / "some.parquet"), rows=rows)
  assert not refusals and sum(part.rows for part in parts) == 10
  assert read(parts) == list(enumerate(values))


def test_a_corrupt_row_group_costs_its_rows_only(tmp_path):
  path = tmp_path / "some.parquet"
  values = [{"prompt": f"post {i}? " + str(random.Random(i).random()) * 20} for i in range(12)]
  write_parquet(path, values, compression="zstd")
  data = bytearray(path.read_bytes())
  column = pq.ParquetFile(path).metadata.row_group(1).column(0)
  start = column.dictionary_page_offset or column.data_page_offset
  data[start : start + column.total_compressed_size] = bytes(column.total_compressed_size)
  path.write_bytes(data)
  parts, _ = find_parts(str(path), rows=100)
  found = read(parts)
  assert [item for item in found if not isinstance(item, Refusal)] == [
    (i, values[i]) for i in (0, 1, 2, 3, 8, 9, 10, 11)
  ]
  (refusal,) = (item for item in found if isinstance(item, Refusal))
  assert (refusal.row, refusal.rows) == (4, 4) and "row group 1 cannot be read" in refusal.reason


def test_invalid_utf8_in_parquet_is_refused_by_field(tmp_path):
  path = tmp_path / "some.parquet"
  names = pa.array([b"one", b"t\xffo", b"three"], pa.binary())
  strings = pa.Array.from_buffers(pa.string(), 3, names.buffers())  # unchecked
  pq.write_table(pa.table({"n": [1, 2, 3], "prompt": strings}), path)
  parts, _ = find_parts(str(path), rows=10)
  first, refusal, third = read(parts)
  assert (first, third) == ((0, {"n": 1, "prompt": "one"}), (2, {"n": 3, "prompt": "three"}))
  assert (refusal.row, refusal.field) == (1, "prompt") and "UTF-8" in refusal.reason


def test_a_file_that_is_no_parquet_is_refused_whole(tmp_path):
  path = tmp_path / "some.parquet"
  path.write_text("not parquet")
  parts, (refusal,) = find_parts(str(path), rows=10)
  assert parts == [] and "is not parquet" in refusal.reason


def test_files_are_found_by_path_pattern_and_url(tmp_path):
  import fsspec

  for name in ("b.json", "a.json", "c.txt"):
    (tmp_path / name).write_text("[]")
  assert find_files([f"{tmp_path}/*.json"]) == [f"{tmp_path}/{n}.json" for n in "ab"]
  assert find_files([f"{tmp_path}/c.txt"]) == [f"{tmp_path}/c.txt"]
  with fsspec.open("memory://bucket/some.json", "w") as file:
    json.dump(records(3), file)
  (url,) = find_files(["memory://bucket/*.json"])
  parts, _ = find_parts(url, rows=2)
  assert read(parts) == list(enumerate(records(3)))
  with pytest.raises(FileNotFoundError, match=r"nowhere\.json matches no file; set config\.files"):
    find_files([f"{tmp_path}/nowhere.json"])
