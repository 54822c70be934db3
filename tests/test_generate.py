"""Requests to answers: a file, a second run of it, a person at a terminal, and bad input."""

import dataclasses
import json
import subprocess
import sys
import time

import numpy as np
import pytest

from alignx_jax.data.formatting import tokenise
from alignx_jax.data.records import parse_record
from alignx_jax.data.rows import Regions
from alignx_jax.experiments.policies import load_policy
from alignx_jax.inference.answering import answer_file
from alignx_jax.inference.persona_judge import Judging
from alignx_jax.inference.prompts import Sampling
from alignx_jax.inference.requests import Prompter, parse_line, parse_request
from alignx_jax.personas.distribution import Preferences
from alignx_jax.personas.preferences import alignx_space
from configs import base
from tests.small_records import small_record

SHORT = Sampling(max_new_tokens=8)
SPACE = alignx_space()


def tiny_policy(**options):
  config = base.get_config()
  config.model.weights = "preset:tiny"
  config.train.devices = 1
  return load_policy(config, None, rows=4, **options)


@pytest.fixture(scope="module")
def policy():
  return tiny_policy()


def write_requests(path, records):
  path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
  return path


def requests_of(count):
  records = [small_record(i) for i in range(count)]
  return [record | {"id": f"r{i}", "seed": i} for i, record in enumerate(records)]


def read(path):
  return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n")[:-1]]


def test_a_prompt_has_the_very_tokens_of_training(policy):
  record = small_record(3) | {"prompt": "Say <|im_end|> twice"}
  request = parse_request(record, SPACE, "here", SHORT)
  example = parse_record(record, SPACE, "here")
  for condition in ("persona", "inferred", "golden", "none"):
    formatting = dataclasses.replace(
      policy.formatting, condition=condition, regions=Regions(4096, 256, 1)
    )
    (prompt,) = Prompter(formatting, 8192).prompts([request])
    assert list(prompt.ids) == tokenise(example, formatting, example.persona).context


def test_a_file_is_answered_in_order_and_what_was_answered_is_kept(policy, tmp_path, capsys):
  records = requests_of(6)
  records[2] |= {"source": "a survey", "max_new_tokens": 3}
  whole = answer_file(
    policy, write_requests(tmp_path / "in.jsonl", records), tmp_path / "whole.jsonl", SHORT
  )
  assert (whole.answered, whole.kept, whole.refused) == (6, 0, 0)
  answers = read(tmp_path / "whole.jsonl")
  assert [answer["id"] for answer in answers] == [f"r{i}" for i in range(6)]
  assert answers[2]["source"] == "a survey" and answers[2]["tokens"] == 3
  assert answers[0]["prompt"] == "post 0" and isinstance(answers[0]["response"], str)
  # A kill in the middle of a line, after two answers.
  lines = (tmp_path / "whole.jsonl").read_text(encoding="utf-8").split("\n")
  output = tmp_path / "again.jsonl"
  output.write_text("\n".join([lines[4], lines[1], lines[3][:20]]), encoding="utf-8")
  again = answer_file(policy, tmp_path / "in.jsonl", output, SHORT)
  assert (again.answered, again.kept) == (4, 2)
  assert read(output) == answers
  assert answer_file(policy, tmp_path / "in.jsonl", output, SHORT).kept == 6
  with pytest.raises(ValueError, match="again.jsonl:1 answers another request, or by another"):
    answer_file(policy, tmp_path / "in.jsonl", output, Sampling(temperature=0.5))
  output.write_text("{}\n")
  with pytest.raises(ValueError, match="again.jsonl:1 is no answer"):
    answer_file(policy, tmp_path / "in.jsonl", output, SHORT)
  capsys.readouterr()


def test_bad_requests_are_told_counted_and_the_others_answered(policy, tmp_path, capsys):
  good, *bad = requests_of(7)
  bad[0] = {"prompt": "No persona"}
  bad[1] |= {"temperature": -1}
  bad[2] |= {"prompt": " "}
  bad[3] |= {"preferences": {"Likes humor": 1.0}}
  bad[4] |= {"prompt": "long " * 2000}
  path = write_requests(tmp_path / "in.jsonl", [good, *bad[:5]])
  with path.open("a") as file:
    file.write('{"prompt": "cut\n[1]\n\n' + json.dumps(good) + "\n")
  told = answer_file(policy, path, tmp_path / "out.jsonl", SHORT)
  assert (told.answered, told.refused) == (2, 7)
  assert told.summary.startswith("2 answered, 0 answered before, 7 refused: ")
  said = capsys.readouterr().err
  for sentence in (
    "in.jsonl:2: field 'User-Generated Content' is missing or empty",
    "in.jsonl:3: field 'temperature' is -1; give a number, 0, for the most probable, or more.",
    "in.jsonl:4: field 'prompt' is empty; drop the record or fill it in.",
    "in.jsonl:5: field 'preferences' steers P̃ of a learned bridge, and this policy has none;",
    "in.jsonl:6: field 'prompt' and the persona make 10",
    "in.jsonl:7: is not JSON (",
    "in.jsonl:8: the request is a list; make it an object.",
  ):
    assert f"Not answered: {sentence}" in said
  assert [answer["line"] for answer in read(tmp_path / "out.jsonl")] == [1, 10]


@pytest.mark.parametrize(
  ("change", "message"),
  [
    ({"judge": {"temperature": 1}}, "field 'judge.temperature' is of no persona; remove it."),
    ({"judge": "Ann"}, "field 'judge' is a str; make it a persona's object."),
    ({"preferences": ["x"]}, "field 'preferences' is no object"),
    ({"preferences": {"Likes humour": 1}}, "field 'preferences' does not fit: "),
    ({"top_p": 2.0}, "field 'top_p' is 2.0; give a number, above 0 and at most 1"),
  ],
)
def test_fields_that_do_not_fit_are_named(change, message):
  with pytest.raises(ValueError, match="in:1: ") as caught:
    parse_line(json.dumps(small_record(0) | change), SPACE, "in:1", SHORT)
  assert message in str(caught.value)


def test_p_from_a_bridge_is_steered_and_told(policy):
  strengths = {"Likes humor": 1.0}
  record = {"prompt": "Hi", "preferences": strengths}
  request = parse_request(record, SPACE, "here", SHORT)
  infer = lambda personas, posts: [Preferences.neutral(SPACE) for _ in posts]
  expected = Preferences.neutral(SPACE).with_preferences(strengths)
  as_tokens = dataclasses.replace(policy.formatting, condition="bridge")
  (prompt,) = Prompter(as_tokens, 8192, infer).prompts([request])
  np.testing.assert_array_equal(prompt.preferences_PK, expected.probabilities_PK)
  as_text = dataclasses.replace(policy.formatting, condition="profile")
  (prompt,) = Prompter(as_text, 8192, infer).prompts([request])
  assert prompt.preferences_PK is None
  assert "Preferences: Likes humor\n" in policy.formatting.tokenizer.decode(prompt.ids)


@pytest.mark.slow
def test_two_personas_answer_a_file_together(policy, tmp_path):
  records = [record | {"judge": small_record(i + 20)} for i, record in enumerate(requests_of(3))]
  for record in records:
    record["judge"] = {"User-Generated Content": record["judge"]["User-Generated Content"]}
  other = records[2].pop("judge")
  path = write_requests(tmp_path / "in.jsonl", records)
  told = answer_file(policy, path, tmp_path / "out.jsonl", SHORT, judging=Judging(2))
  assert (told.answered, told.refused) == (2, 1)
  output = tmp_path / "all.jsonl"
  told = answer_file(policy, path, output, SHORT, judging=Judging(2), judge=other)
  assert (told.answered, told.refused) == (3, 0)
  for answer in read(output):
    assert 0 <= answer["acceptance"] <= 1 and answer["passes_per_token"] >= 1


def test_a_stream_says_what_a_file_does(policy, tmp_path):
  record = small_record(1) | {"max_new_tokens": 20}
  write_requests(tmp_path / "in.jsonl", [record])
  answer_file(policy, tmp_path / "in.jsonl", tmp_path / "out.jsonl", SHORT)
  request = parse_request(record, SPACE, "here", SHORT)
  assert "".join(policy.stream(request)) == read(tmp_path / "out.jsonl")[0]["response"]


def _generate(*arguments, **options):
  command = [sys.executable, "-m", "alignx_jax.generate", *arguments]
  return subprocess.run(command, capture_output=True, text=True, timeout=240, **options)


def test_help_comes_at_once():
  started = time.perf_counter()
  done = _generate("--help")
  assert time.perf_counter() - started < 3
  assert "--requests" in done.stdout and "--judge" in done.stdout


@pytest.mark.slow
def test_a_person_types_posts_and_a_mistake_is_told_in_one_sentence(tmp_path):
  common = ["--config=configs/base.py", f"--workdir={tmp_path}", "--user=0"]
  tiny = ["--config.model.weights=preset:tiny", "--max_new_tokens=5", "--base"]
  done = _generate(*common, *tiny, "--seed=1", input="Tea?\nA free day?\n")
  assert done.returncode == 0, done.stderr[-2000:]
  assert done.stdout.startswith("Policy: the base preset:tiny, conditioned on: persona\n")
  assert done.stdout.count("\n") >= 3
  done = _generate(*common, *tiny, "--temperature=-1")
  assert done.returncode == 1
  assert done.stderr.strip().splitlines()[-1] == (
    "Error: --temperature is -1.0; give a number, 0, for the most probable, or more."
  )
