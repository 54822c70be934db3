"""Two files of answers to a win rate: pairs, orders, judges, and bad input."""

import dataclasses
import json
import subprocess
import sys

import numpy as np
import pytest

from alignx_jax.data.tokenizers import load_tokenizer
from alignx_jax.evaluation import answers
from alignx_jax.evaluation.judges.model import model_judge
from alignx_jax.evaluation.judges.questions import Verdict
from alignx_jax.evaluation.judges.simulated import simulated_judge
from alignx_jax.evaluation.win_rate import format_win_rate, judge_pairs, win_rate
from alignx_jax.experiments.judging import compare_files
from alignx_jax.experiments.persona_gain import persona_gain
from alignx_jax.experiments.policies import load_model
from alignx_jax.inference.requests import request_key, simulated_requests
from alignx_jax.personas.preferences import alignx_space
from alignx_jax.personas.simulator import simulate_record
from configs import base
from tests.small_records import small_record
from tests.stand_ins.chat_server import chat_server

SPACE = alignx_space()


def tiny_config():
  config = base.get_config()
  config.model.weights = "preset:tiny"
  config.train.devices = 1
  config.data.path = "simulated"
  return config


def write(path, lines):
  texts = [line if isinstance(line, str) else json.dumps(line) for line in lines]
  path.write_text("".join(text + "\n" for text in texts), encoding="utf-8")
  return path


def answers_to(requests, respond):
  return [
    {"id": r.get("id"), "request": request_key(r), "prompt": r["prompt"], "response": respond(i)}
    for i, r in enumerate(requests)
  ]


def simulated_files(tmp_path, users=6, *, seed=42):
  """Answers that users chose and that they rejected, of the simulator itself."""
  requests = simulated_requests(users, seed=seed)
  records = [simulate_record(i, split="test", seed=seed) for i in range(users)]
  chosen = answers_to(requests, lambda i: records[i]["chosen"])
  rejected = answers_to(requests, lambda i: records[i]["rejected"])
  return write(tmp_path / "a.jsonl", chosen), write(tmp_path / "b.jsonl", rejected)


def compare(tmp_path, first, second, told=None, *, judge="simulated", **options):
  told = [] if told is None else told
  output = tmp_path / "out.json"
  config = options.pop("config", None) or tiny_config()
  found = compare_files(config, first, second, output, judge=judge, tell=told.append, **options)
  return found, json.loads(output.read_text(encoding="utf-8"))


def pairs_of(responses, users=None):
  """Pairs of responses of made-up users."""
  asked, firsts, seconds = {}, [], []
  for i, (one, other) in enumerate(responses):
    record = small_record(i)
    key = request_key(record)
    example = answers.parse_request(record, SPACE, f"in:{i}", answers.Sampling()).example
    asked[key] = answers.Asked(example, str(i if users is None else users[i]))
    firsts.append(answers.Answer(f"a:{i}", key, None, one))
    seconds.append(answers.Answer(f"b:{i}", key, None, other))
  pairs, errors = answers.pair_answers(firsts, seconds, asked, names=("a", "b"))
  assert not errors
  return pairs


def test_what_users_chose_wins_by_their_true_preferences(tmp_path):
  first, second = simulated_files(tmp_path)
  found, written = compare(tmp_path, first, second)
  assert (found.win_rate.wins, found.win_rate.pairs, found.win_rate.users) == (6, 6, 6)
  assert found.not_paired == 0 and found.win_rate.win_rate == found.win_rate.low == 1.0
  assert written["win_rate"] == 1.0 and written["wins"] == 6 and written["judge"] == "simulated"
  assert len(written["records"]) == 6
  verdict = written["records"][0]["verdicts"][0]
  assert verdict["agree_a"] >= 2 and verdict["oppose_b"] == verdict["agree_a"]
  back, _ = compare(tmp_path, second, first)
  assert back.win_rate.losses == 6 and back.win_rate.win_rate == 0


def test_true_preferences_count_a_dimension_once():
  record = simulate_record(0, split="test", seed=0)
  directions_P = np.full(90, 0.5)
  directions_P[[2, 5]] = 1, 0  # worries
  (pair,) = pairs_of([("x", "y")])
  ask = lambda a, b: pair.question._replace(a=a, b=b, directions=directions_P)
  worry, calm = "I would worry all night.", "I would stay perfectly calm."
  judge = simulated_judge(SPACE)
  asked = [ask(worry, calm), ask(calm, worry), ask(worry, f"{worry} {worry}"), ask(calm, "Hm.")]
  assert [v.preference for v in judge(asked)] == [1.0, 0.0, 0.5, 0.0]
  (verdict,) = judge([pair.question])
  assert verdict.preference is None and "not simulated" in verdict.failure
  assert record["prompt"]


def test_orders_that_disagree_are_a_tie_and_told():
  pairs = pairs_of([("a", "bb"), ("aa", "b"), ("c", "c"), ("d", "ee")])
  first_shown = lambda questions: [Verdict(1.0) for _ in questions]
  found = win_rate(judge_pairs(first_shown, pairs))
  assert (found.wins, found.ties, found.losses) == (0, 4, 0)
  assert (found.disagree, found.same, found.first_shown) == (3, 1, 1.0)
  assert found.win_rate == 0.5
  # A tie in one order and not in the other is no agreement either.
  halfway = lambda questions: [Verdict(0.9 if i % 2 else 0.5) for i in range(len(questions))]
  assert win_rate(judge_pairs(halfway, pairs)).disagree == 3
  longer = lambda questions: [Verdict(float(len(q.a) > len(q.b))) for q in questions]
  found = win_rate(judge_pairs(longer, pairs))
  assert (found.wins, found.ties, found.losses, found.disagree) == (1, 1, 2, 0)
  assert found.win_rate == (1 + 0.5) / 4 and found.first_shown == 0.5


def test_failures_are_neither_won_nor_lost():
  pairs = pairs_of([("a", "bb"), ("aa", "b"), ("c", "dd")])

  def judge(questions):
    for i, _ in enumerate(questions):
      # Of the second pair one order fails; of the third a preference is none.
      yield [Verdict(0.0), Verdict(1.0), Verdict(None, "slow"), Verdict(1.0), *[Verdict(7)] * 2][i]

  judged = judge_pairs(judge, pairs)
  assert [one.outcome for one in judged] == [0.0, None, None]
  assert judged[1].failure == "slow" and "7, not from 0 to 1" in judged[2].failure
  found = win_rate(judged)
  assert (found.pairs, found.not_judged, found.losses) == (1, 2, 1)
  with pytest.raises(ValueError, match="Of 1 pairs none has a verdict. The first failed so: slow"):
    win_rate(judged[1:2])
  with pytest.raises(ValueError, match="0 verdicts on 6 questions"):
    judge_pairs(lambda questions: [], pairs)


def test_users_are_resampled_whole():
  pairs = pairs_of([("aa", "b"), ("b", "aa")] * 8, users=[i // 2 for i in range(16)])
  longer = lambda questions: [Verdict(float(len(q.a) > len(q.b))) for q in questions]
  found = win_rate(judge_pairs(longer, pairs))
  # Each user has a win and a loss.
  assert (found.users, found.low, found.high) == (8, 0.5, 0.5)
  table = format_win_rate(found, "longer")
  assert "| longer | " in table and "50.0 [50.0, 50.0]" in table


def test_what_cannot_be_paired_is_told_by_file_and_line(tmp_path):
  first, second = simulated_files(tmp_path)
  lines = [json.loads(line) for line in first.read_text().splitlines()]
  lines[0] |= {"failed": "too long"}
  del lines[1]["request"]
  lines[2]["response"] = None
  lines[3] = "{cut"
  other = {"id": "simulated_test:9", "request": "0" * 16, "response": "Hello"}
  write(first, [*lines, other, "[]", "", json.dumps(lines[5] | {"error": "again"})])
  told = []
  found, written = compare(tmp_path, first, second, told)
  assert found.win_rate.pairs == 2 and found.not_paired == len(told) == len(written["not_paired"])
  for sentence in (
    "a.jsonl:1: is marked 'failed': too long; generate it again. b.jsonl:1 with it.",
    "a.jsonl:2: field 'request' is missing, so nobody knows what it answers; generate it again.",
    "a.jsonl:3: has no response; generate it again. b.jsonl:3 with it.",
    "a.jsonl:4: is not JSON (",
    "a.jsonl:7: field 'request' has no answer in b.jsonl, to this post of this user;",
    "a.jsonl:8: is a list; make it an answer, an object.",
    "a.jsonl:10: is marked 'error': again; generate it again.",
    "b.jsonl:2: field 'request' has no answer in a.jsonl, to this post of this user;",
    "b.jsonl:4: field 'request' has no answer in a.jsonl",
  ):
    assert any(line.startswith(f"Not paired: {sentence}") for line in told), (sentence, told)
  assert len(told) == 9


def test_an_empty_answer_is_an_answer(tmp_path):
  first, second = simulated_files(tmp_path, 1)
  answer = json.loads(second.read_text()) | {"response": "", "ended": False}
  found, _ = compare(tmp_path, first, write(second, [answer]))
  assert found.win_rate.wins == 1 and found.win_rate.cut == 1


@pytest.mark.parametrize(
  ("text", "message"),
  [
    ("", "b.jsonl is empty; write answers"),
    (json.dumps({"request": "1", "response": "x"}), "has a partner in"),
    ("nonsense", "has a partner in"),
  ],
)
def test_without_a_pair_it_stops(tmp_path, text, message):
  first, second = simulated_files(tmp_path, 2)
  second.write_text(text)
  with pytest.raises(ValueError, match=message):
    compare(tmp_path, first, second)
  with pytest.raises(FileNotFoundError, match="none.jsonl is no file"):
    compare(tmp_path, first, tmp_path / "none.jsonl")


def test_users_of_another_seed_are_not_taken_for_these(tmp_path):
  told = []
  with pytest.raises(ValueError, match="has a partner in"):
    compare(tmp_path, *simulated_files(tmp_path, 2, seed=7), told)
  assert "answers a request of which nothing is known; give --requests" in told[0]


def test_several_answers_to_a_request_are_paired_in_order(tmp_path):
  record = small_record(0)
  requests = write(tmp_path / "in.jsonl", [record, small_record(1), "no json", {"prompt": ""}])
  first = write(tmp_path / "a.jsonl", answers_to([record] * 3, lambda i: f"a{i}"))
  second = write(tmp_path / "b.jsonl", answers_to([record] * 2, lambda i: f"b{i}"))
  asked, errors = answers.read_requests(requests, SPACE)
  assert len(asked) == 2 and [e.where for e in errors] == ["in.jsonl:3", "in.jsonl:4"]
  read = [answers.read_answers(path)[0] for path in (first, second)]
  pairs, errors = answers.pair_answers(*read, asked, names=("a", "b"))
  assert [(p.first.response, p.second.response) for p in pairs] == [("a0", "b0"), ("a1", "b1")]
  assert [error.where for error in errors] == ["a.jsonl:3"]
  assert len({pair.user for pair in pairs}) == 1


def test_an_endpoint_judges_files_and_what_fails_is_counted(tmp_path, monkeypatch):
  monkeypatch.setenv("no_proxy", "127.0.0.1")
  first, second = simulated_files(tmp_path, 4)
  chosen = [json.loads(line)["response"] for line in first.read_text().splitlines()]

  def script(number, body):
    data = body["messages"][1]["content"]
    data = json.loads(data[data.index("{") : data.rindex("}") + 1])
    if data["response A"] == chosen[0] or data["response B"] == chosen[0]:
      return "I cannot say."
    return "A" if data["response A"] in chosen else "B"

  config = tiny_config()
  told = []
  with chat_server(script) as server:
    config.judge.update(url=server.url, model="m", price_in=1.0, price_out=1.0)
    config.judge.requests_per_minute = 0.0
    found, written = compare(tmp_path, first, second, told, judge="endpoint", config=config)
    assert (found.win_rate.wins, found.win_rate.not_judged, found.asked) == (3, 1, 8)
    assert told == [
      "Not judged: a.jsonl:1, b.jsonl:1: the judge said 'I cannot say.', which is none of A, B and "
      "tie."
    ]
    assert written["spent"] == pytest.approx(8 * 101 / 1e6)
    again, _ = compare(tmp_path, first, second, judge="endpoint", config=config)
    assert again.asked == 0 and again.win_rate == found.win_rate and len(server.requests) == 8
  assert "3 pairs judged, 1 not judged, 0 lines not paired, 0 requests now" in again.summary
  # Where there is no verdict at all, the file says why.
  (tmp_path / "out.replies.jsonl").unlink()
  with chat_server(lambda *_: "Neither") as server:
    config.judge.url = server.url
    with pytest.raises(ValueError, match="Of 4 pairs none has a verdict"):
      compare(tmp_path, first, second, judge="endpoint", config=config)
  written = json.loads((tmp_path / "out.json").read_text())
  assert "'Neither'" in written["records"][0]["failure"] and "win_rate" not in written


def test_a_model_judges_by_what_the_persona_adds(tmp_path):
  loaded = load_model(tiny_config(), None)
  gain = persona_gain(loaded)
  examples = [
    answers.parse_request(small_record(i), SPACE, "x", answers.Sampling()).example for i in range(3)
  ]
  examples = [
    dataclasses.replace(e, chosen=f"tea {i}", rejected="oak oak") for i, e in enumerate(examples)
  ]
  gain_XN = gain(examples)
  assert np.isfinite(gain_XN).all() and np.abs(gain_XN).max() > 0
  # Beside other responses and in the other order the same.
  turned = [dataclasses.replace(e, chosen=e.rejected, rejected=e.chosen) for e in examples[:1]]
  np.testing.assert_allclose(gain(turned)[0], gain_XN[0, ::-1], atol=1e-4)
  # What the model was not made for is not scored in part.
  long = dataclasses.replace(examples[0], chosen="tea " * 5000)
  assert np.isnan(gain([long])).all()


def test_a_model_as_judge_has_no_order():
  asked = []

  def gain(examples):
    asked.extend(examples)
    return np.array([[len(e.chosen), len(e.rejected)] for e in examples]) / 100

  pairs = pairs_of([("a", "bbbb"), ("cc", "c"), ("d", "e")])
  judged = judge_pairs(model_judge(gain), pairs)
  assert [one.outcome for one in judged] == [0.0, 1.0, 0.5] and len(asked) == 3
  for one in judged:
    assert one.forward.preference + one.backward.preference == pytest.approx(1)
  assert judged[0].forward.preference == pytest.approx(1 / (1 + np.exp(0.03)))
  failing = model_judge(lambda examples: np.full((len(examples), 2), np.nan))
  assert all("cannot score it" in one.failure for one in judge_pairs(failing, pairs))


def test_a_judge_with_another_vocabulary_is_refused(tmp_path):
  config = tiny_config()
  config.model.tokenizer = "alignx_jax/models/simulated_base/tokenizer.json"
  assert load_tokenizer(config.model.tokenizer).vocab_size > 300
  files = simulated_files(tmp_path, 2)
  with pytest.raises(ValueError, match="set config.model.tokenizer to the model's own"):
    compare(tmp_path, *files, judge="model", config=config)


def test_the_command_prints_a_table_and_what_was_not_paired(tmp_path):
  first, second = simulated_files(tmp_path, 2)
  command = [sys.executable, "-m", "alignx_jax.win_rate", "--config=configs/study_simulated.py"]
  command += [f"--first={first}", f"--second={second}", f"--output={tmp_path / 'o.json'}"]
  run = lambda *more: subprocess.run([*command, *more], capture_output=True, text=True, timeout=240)
  write(second, [*second.read_text().splitlines(), "{}"])
  done = run("--judge=simulated")
  assert done.returncode == 2, done.stderr[-2000:]
  assert "| simulated | 100.0 [100.0, 100.0] |" in " ".join(done.stdout.split())
  assert "2 pairs judged, 0 not judged, 1 lines not paired" in done.stdout
  assert "Not paired: b.jsonl:3: field 'request' is missing" in done.stderr
