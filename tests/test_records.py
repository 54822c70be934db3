"""The record schema: every bad record is refused in one clear sentence."""

import copy
import json
import math

import numpy as np
import pytest

from alignx_jax.data.records import (
  COMMENTS,
  DESCRIPTION,
  DIRECTIONS,
  PAIRS,
  RecordError,
  parse_record,
  read_examples,
)
from alignx_jax.personas.persona import Persona
from alignx_jax.personas.preferences import alignx_space

SPACE = alignx_space()
GOOD = {
  "prompt": "Tea or coffee?",
  "chosen": "Tea.",
  "rejected": "Coffee.",
  DIRECTIONS: [0.5] * 88 + [1, 0],
  COMMENTS: [
    {"prompt": "Best soup?", "comment": "Lentil.", DIRECTIONS: [1] + [0.5] * 89},
    {"prompt": "Best bread?", "comment": "Rye."},
  ],
  PAIRS: [{"prompt": "A gift?", "chosen": "A book.", "rejected": "A phone."}],
  DESCRIPTION: "A gardener.",
}


def changed(path, *value):
  """GOOD with the field at `path` set to a value, or deleted without one."""
  record = copy.deepcopy(GOOD)
  *above, last = path
  holder = record
  for key in above:
    holder = holder[key]
  if value:
    holder[last] = value[0]
  else:
    del holder[last]
  return record


def name_of(path):
  """The name errors use: User-Generated Content[1].comment."""
  return "".join(f"[{k}]" if isinstance(k, int) else f".{k}" for k in path).removeprefix(".")


def direction_at(index, value):
  return [0.5] * index + [value] + [0.5] * (89 - index)


ANOTHER_SPACE = (
  "the preference space 'alignx' has 90: set config.data.space to the space that the records "
  "were labelled in"
)
BAD = [
  *[((field,), (), "is missing", "add it") for field in ("prompt", "chosen", "rejected")],
  ((COMMENTS, 1, "comment"), (), "is missing", "add it"),
  ((PAIRS, 0, "rejected"), (), "is missing", "add it"),
  ((DIRECTIONS,), ([0.5] * 91,), "has 91 values", ANOTHER_SPACE),
  ((DIRECTIONS,), ([0.5] * 89,), "has 89 values", ANOTHER_SPACE),
  ((COMMENTS, 0, DIRECTIONS), ([],), "has 0 values", ANOTHER_SPACE),
  ((DIRECTIONS,), (direction_at(3, 0.3),), "has 0.3 at index 3", "use 0, 0.5 or 1"),
  ((DIRECTIONS,), (direction_at(0, True),), "has True at index 0", "use 0, 0.5 or 1"),
  ((DIRECTIONS,), (direction_at(89, math.nan),), "has nan at index 89", "use 0, 0.5 or 1"),
  ((DIRECTIONS,), (direction_at(9, None),), "has None at index 9", "use 0, 0.5 or 1"),
  ((PAIRS, 0, DIRECTIONS), (direction_at(7, "1"),), "has a str at index 7", "use 0, 0.5 or 1"),
  ((DIRECTIONS,), ("0.5",), "is a str", "make it a list of numbers"),
  ((DIRECTIONS,), (1,), "is a int", "make it a list of numbers"),
  (("chosen",), ("",), "is empty", "drop the record or fill it in"),
  (("rejected",), (" \n\t",), "is empty", "drop the record or fill it in"),
  ((COMMENTS, 0, "comment"), ("",), "is empty", "fill it in"),
  (("prompt",), (5,), "is a int", "make it a string"),
  (("chosen",), (None,), "is a NoneType", "make it a string"),
  (("profile",), (["Young"],), "is a list", "make it a string"),
  ((DESCRIPTION,), ({"age": 3},), "is a dict", "make it a string"),
  ((COMMENTS, 1, "prompt"), (["x"],), "is a list", "make it a string"),
  ((PAIRS, 0), ("A book.",), "is a str", "make it an object"),
  ((COMMENTS, 1), (None,), "is a NoneType", "make it an object"),
  ((COMMENTS,), ("Lentil.",), "is a str", "make it a list"),
  ((PAIRS,), ({"prompt": "A gift?"},), "is a dict", "make it a list"),
  (("prompt",), ("half a \ud83d",), "is not valid Unicode", "mend it"),
  ((COMMENTS, 0, "comment"), ("half a \ude00",), "is not valid Unicode", "mend it"),
  ((DESCRIPTION,), ("\udfff",), "is not valid Unicode", "mend it"),
]


@pytest.mark.parametrize(("path", "value", "reason", "remedy"), BAD)
def test_a_bad_record_is_refused_in_one_clear_sentence(tmp_path, path, value, reason, remedy):
  file = tmp_path / "users.json"
  file.write_text(json.dumps([GOOD, changed(path, *value)]), encoding="utf-8")
  with pytest.raises(RecordError) as error:
    read_examples(file, SPACE)
  message = str(error.value)
  assert message.startswith(f"users.json:1: field '{name_of(path)}' {reason}")
  assert remedy in message.split(reason)[1]
  assert message.endswith(".") and "\n" not in message
  assert message.encode("utf-8")  # can be logged, whatever the text was
  assert error.value.field == name_of(path)
  assert error.value.reason in message


@pytest.mark.parametrize("record", [["Tea or coffee?"], "Tea or coffee?", None])
def test_a_record_that_is_no_object_is_refused(record):
  with pytest.raises(RecordError, match=r"^users.json:4: .*record is a \w+; make it an object\.$"):
    parse_record(record, SPACE, "users.json:4")


def test_a_record_that_is_no_object_has_no_field_to_name():
  with pytest.raises(RecordError) as error:
    parse_record([], SPACE, "users.json:4")
  assert "''" not in str(error.value)


@pytest.mark.parametrize(
  ("content", "message"),
  [
    (json.dumps([GOOD])[:-40].encode(), "is not whole JSON .*; fetch it again"),
    (b"", "is not whole JSON .*; fetch it again"),
    (b'["\xff"]', "is not whole JSON .*; fetch it again"),
    (json.dumps(GOOD).encode(), "holds a dict; it must be a list of records"),
    (b'"text"', "holds a str; it must be a list of records"),
  ],
)
def test_a_bad_file_is_refused_by_its_name(tmp_path, content, message):
  file = tmp_path / "users.json"
  file.write_bytes(content)
  with pytest.raises(ValueError, match=message) as error:
    read_examples(file, SPACE)
  assert str(file) in str(error.value)


def test_a_file_that_is_not_there_is_refused_by_its_name(tmp_path):
  with pytest.raises(FileNotFoundError, match=r"nowhere\.json is no file; set config\."):
    read_examples(tmp_path / "nowhere.json", SPACE)


def test_a_good_record_is_taken_whole():
  example = parse_record(GOOD | {"profile": "Young", "other": 1}, SPACE, "users.json:0")
  assert (example.id, example.post, example.chosen, example.rejected, example.profile) == (
    "users.json:0",
    "Tea or coffee?",
    "Tea.",
    "Coffee.",
    "Young",
  )
  np.testing.assert_array_equal(example.directions, GOOD[DIRECTIONS])
  soup, bread = example.persona.comments
  assert (soup.post, soup.comment) == ("Best soup?", "Lentil.")
  np.testing.assert_array_equal(soup.directions, GOOD[COMMENTS][0][DIRECTIONS])
  assert (bread.post, bread.comment, bread.directions) == ("Best bread?", "Rye.", None)
  (gift,) = example.persona.pairs
  assert (gift.post, gift.chosen, gift.rejected) == ("A gift?", "A book.", "A phone.")
  assert example.persona.description == "A gardener."


@pytest.mark.parametrize("absent", [True, False])
def test_persona_parts_may_be_absent_or_null(absent):
  optional = (COMMENTS, PAIRS, DESCRIPTION, DIRECTIONS, "profile")
  record = {key: value for key, value in GOOD.items() if key not in optional}
  example = parse_record(record if absent else record | dict.fromkeys(optional), SPACE, "r:0")
  assert example.persona == Persona()
  assert example.directions is None and example.profile is None


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.float16])
def test_directions_may_be_an_array(dtype):
  record = GOOD | {DIRECTIONS: np.asarray(GOOD[DIRECTIONS], dtype)}
  np.testing.assert_array_equal(parse_record(record, SPACE, "r:0").directions, GOOD[DIRECTIONS])


def test_all_real_records_parse(p_soups):
  records = json.loads(p_soups.read_text(encoding="utf-8"))
  examples = read_examples(p_soups, SPACE)
  assert len(examples) == len({example.id for example in examples}) == 600
  for record, example in zip(records, examples, strict=True):
    assert (example.post, example.chosen, example.rejected, example.profile) == (
      record["prompt"],
      record["chosen"],
      record["rejected"],
      record["profile"],
    )
    assert [
      {"prompt": pair.post, "chosen": pair.chosen, "rejected": pair.rejected}
      for pair in example.persona.pairs
    ] == record[PAIRS]
    assert example.persona.comments == () and example.directions is None
    assert SPACE.verbalise(SPACE.parse(example.profile)) == example.profile
