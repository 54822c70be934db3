"""Two files of answers to a win rate, by a judge that a config names."""

import urllib.parse
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from alignx_jax.evaluation import answers, win_rate
from alignx_jax.evaluation.judges.cache import ReplyCache
from alignx_jax.evaluation.judges.chat import Chat, key_from
from alignx_jax.evaluation.judges.endpoint import EndpointJudge
from alignx_jax.evaluation.judges.model import model_judge
from alignx_jax.evaluation.judges.questions import Judge
from alignx_jax.evaluation.judges.simulated import simulated_judge
from alignx_jax.experiments.experiment import data_space
from alignx_jax.experiments.persona_gain import persona_gain
from alignx_jax.experiments.policies import load_model
from alignx_jax.personas.preferences import alignx_space
from alignx_jax.training import hosts


class Compared(NamedTuple):
  """What came of two files.

  Attributes:
    judge: what judged, for people.
    not_paired: answers and lines that are in no pair.
    asked, spent: of an endpoint: attempts now, and the cost of all replies that are kept; or None.
  """

  judge: str
  win_rate: win_rate.WinRate
  not_paired: int
  asked: int | None
  spent: float | None
  output: Path

  @property
  def summary(self) -> str:
    """In a sentence."""
    found = self.win_rate
    cost = ""
    if self.asked is not None:
      cost = f", {self.asked:,} requests now, {self.spent:.4f} spent in all"
    return (
      f"{found.pairs:,} pairs judged, {found.not_judged:,} not judged, {self.not_paired:,} lines "
      f"not paired{cost}: {self.output}"
    )


def compare_files(
  config,
  first: Path,
  second: Path,
  output: Path,
  *,
  judge: str,
  requests: Path | None = None,
  workdir: Path | None = None,
  tell: Callable[[str], None] = print,
) -> Compared:
  """Pairs, judges, sums up, and writes JSON with every verdict.

  Args:
    judge: "simulated", "model" or "endpoint".
    requests: what was answered; None for the simulated users of config.seed.
    workdir: of the run that judges; None for the base.
    tell: takes a sentence about each record that is not paired or not judged.
  Raises:
    FileNotFoundError, ValueError: what is not there or does not fit; or there is no verdict.
  """
  if workdir is not None and judge != "model":
    raise ValueError(f"--workdir is of the run that judges; leave it out with --judge={judge}.")
  if output.resolve() in (first.resolve(), second.resolve()):
    raise ValueError(f"--output is {output}, a file of answers; give another.")
  pairs, errors = _read_pairs(config, first, second, requests, judge)
  for error in errors:
    tell(f"Not paired: {error}")
  if not pairs:
    raise ValueError(
      f"No answer of {first} has a partner in {second} that can be judged; generate both from the "
      "same requests."
    )
  ask, name = _make_judge(judge, config, workdir, output)
  judged = win_rate.judge_pairs(ask, pairs)
  for one in judged:
    if one.failure:
      tell(f"Not judged: {one.pair.first.where}, {one.pair.second.where}: {one.failure}.")
  asked, spent = (ask.asked, ask.spent) if isinstance(ask, EndpointJudge) else (None, None)
  about = {"first": str(first), "second": str(second), "judge": name, "spent": spent}
  found = None
  try:
    found = win_rate.win_rate(judged)
  finally:  # where nothing was judged the file says why
    if hosts.is_first():
      win_rate.write_win_rate(output, found, judged, errors, **about)
  return Compared(name, found, len(errors), asked, spent, output)


def _read_pairs(config, first: Path, second: Path, requests: Path | None, judge: str):
  """Pairs, and errors of what is in none."""
  firsts, errors = answers.read_answers(first)
  seconds, more = answers.read_answers(second)
  errors += more
  asked = {}
  if requests is not None:
    asked, more = answers.read_requests(requests, data_space(config))
    errors += more
  if requests is None or judge == "simulated":
    asked = asked | answers.simulated_asked([*firsts, *seconds], seed=config.seed)
  names = first.name, second.name
  pairs, more = answers.pair_answers(firsts, seconds, asked, names=names)
  return pairs, errors + more


def _make_judge(judge: str, config, workdir: Path | None, output: Path) -> tuple[Judge, str]:
  """A judge and what it is."""
  if judge == "simulated":
    return simulated_judge(alignx_space()), "simulated"
  if judge == "model":
    loaded = load_model(config, workdir)
    return model_judge(persona_gain(loaded)), loaded.of
  asked = endpoint_judge(config, output.with_suffix(".replies.jsonl"))
  return asked, f"{config.judge.model} at {asked.chat.url}"


def endpoint_judge(config, cache: Path) -> EndpointJudge:
  """The chat endpoint of config.judge.

  Args:
    cache: JSONL file of its replies.
  Raises:
    ValueError: a field does not fit.
  """
  judge = config.judge
  url = judge.url.rstrip("/").removesuffix("/chat/completions")
  parts = urllib.parse.urlsplit(url)
  if parts.scheme not in ("http", "https") or not parts.netloc:
    raise ValueError(
      f"config.judge.url is {judge.url!r}; set it to that of an OpenAI-compatible server, such as "
      "http://localhost:8000/v1."
    )
  if parts.username or parts.password or parts.query:
    raise ValueError(
      "config.judge.url holds a user name, a password or a query; put the key into the environment "
      f"variable {judge.key_variable} instead."
    )
  if not judge.model:
    raise ValueError("config.judge.model is empty; set it to a model's name at the endpoint.")
  for field in ("price_in", "price_out"):
    if judge[field] is None or not 0 <= judge[field] < float("inf"):
      raise ValueError(
        f"config.judge.{field} is {judge[field]}; set it to the price of a million tokens, 0 if "
        "they are free."
      )
  for field, least in (("attempts", 1), ("parallel", 1), ("max_tokens", 1)):
    if judge[field] < least:
      raise ValueError(f"config.judge.{field} is {judge[field]}; set it to {least} or more.")
  for field in ("max_cost", "requests_per_minute", "backoff"):
    if not 0 <= judge[field] < float("inf"):
      raise ValueError(f"config.judge.{field} is {judge[field]}; set it to 0 or more.")
  if not 0 < judge.timeout < float("inf"):
    raise ValueError(f"config.judge.timeout is {judge.timeout}; set it above 0, in seconds.")
  chat = Chat(url, judge.model, key_from(judge.key_variable), judge.timeout, judge.max_tokens)
  return EndpointJudge(
    chat,
    ReplyCache(cache),
    judge.price_in,
    judge.price_out,
    judge.max_cost,
    attempts=judge.attempts,
    backoff=judge.backoff,
    requests_per_minute=judge.requests_per_minute,
    parallel=judge.parallel,
  )
