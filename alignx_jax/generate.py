"""Answers posts as a user would like best: one person's, typed, or a file of requests.

  python -m alignx_jax.generate --config=configs/X.py --workdir=RUN --user=0
  python -m alignx_jax.generate --config=configs/X.py --workdir=RUN --requests=in.jsonl \\
    --output=out.jsonl
  python -m alignx_jax.generate --config=configs/X.py --workdir=RUN --users=20 --output=out.jsonl

The policy is the run in the workdir, as its config.json says; with --base, the model that the
config names. A user is a persona, a JSON object of a record's fields (--persona=FILE), or one who
is simulated (--user=INDEX). Type a post and the answer appears; an empty line ends.

A line of the file of requests is such an object with a "prompt"; alignx_jax/inference/requests.py
has all fields. Instead of a file, --users=N takes the posts of the first N simulated test users of
the config, so that answers of several policies can be compared (alignx_jax.win_rate). The same
command again goes on where it ended. What cannot be answered is printed, counted, and makes the
exit code 2. With --judge two personas answer together (Persona-judge): the second is a request's
"judge", or --judge_persona's.
"""

import sys
from pathlib import Path

from absl import flags

from alignx_jax import command_line

flags.adopt_module_key_flags(command_line)

_BASE = flags.DEFINE_bool("base", False, "Answer with the base model that the config names.")
_PERSONA = flags.DEFINE_string("persona", None, "JSON file of the persona to answer.")
_USER = flags.DEFINE_integer("user", None, "Index of the simulated user to answer.", lower_bound=0)
_REQUESTS = flags.DEFINE_string("requests", None, "JSONL file of requests.")
_USERS = flags.DEFINE_integer(
  "users", None, "Answer the posts of so many simulated test users.", lower_bound=1
)
_OUTPUT = flags.DEFINE_string("output", None, "JSONL file of answers.")
_CONDITION = flags.DEFINE_string(
  "condition", "", "What the prompt says of the user, if not what the policy was trained on."
)
_DTYPE = flags.DEFINE_string("dtype", "", "Type to compute in, if not the config's.")
_ROWS = flags.DEFINE_integer("rows", 8, "The most requests answered at once.")
_TEMPERATURE = flags.DEFINE_float("temperature", None, "0: the most probable token.")
_TOP_K = flags.DEFINE_integer("top_k", None, "Only so many most probable tokens; 0: all.")
_TOP_P = flags.DEFINE_float("top_p", None, "Only the most probable tokens of this probability.")
_MOST = flags.DEFINE_integer("max_new_tokens", 256, "The most tokens of an answer.")
_SEED = flags.DEFINE_integer("seed", 0, "The same seed gives the same answer.")
_JUDGE = flags.DEFINE_bool("judge", False, "Two personas answer together: Persona-judge.")
_JUDGE_PERSONA = flags.DEFINE_string("judge_persona", None, "JSON file of the second persona.")
_GAMMA = flags.DEFINE_integer("gamma", 4, "Tokens that Persona-judge drafts at a time.")
_COMPAT = flags.DEFINE_string("compat", "", "'release': Persona-judge as its code does it.")


def main(config, workdir):
  # Imported here, so that --help answers at once.
  from alignx_jax.experiments.policies import load_policy
  from alignx_jax.inference.answering import answer_file, answer_requests
  from alignx_jax.inference.conversation import converse
  from alignx_jax.inference.persona_judge import Judging
  from alignx_jax.inference.requests import simulated_requests
  from alignx_jax.training import hosts

  hosts.connect()
  _check_flags(config)
  sampling = _sampling()
  judging = Judging(_GAMMA.value, compat=_COMPAT.value) if _JUDGE.value else None
  policy = load_policy(
    config,
    None if _BASE.value else workdir,
    condition=_CONDITION.value,
    dtype=_DTYPE.value,
    rows=_ROWS.value,
  )
  print(f"Policy: {policy.name}", flush=True)
  other = _read_persona(_JUDGE_PERSONA.value) if _JUDGE_PERSONA.value else None
  if _OUTPUT.value:
    options = {"judging": judging, "judge": other}
    if _REQUESTS.value:
      told = answer_file(policy, Path(_REQUESTS.value), Path(_OUTPUT.value), sampling, **options)
    else:
      requests = simulated_requests(_USERS.value, seed=config.seed, sampling_seed=sampling.seed)
      options["name"] = "simulated users"
      told = answer_requests(policy, requests, Path(_OUTPUT.value), sampling, **options)
    print(told.summary)
    if told.refused:
      sys.exit(2)
  else:
    where = _PERSONA.value or "the persona"
    converse(policy, _persona(), _posts(), sampling, where=where, judging=judging, judge=other)


def _check_flags(config):
  typed = [_PERSONA.value is not None, _USER.value is not None]
  many = [_REQUESTS.value is not None, _USERS.value is not None]
  if sum(typed + many) != 1:
    raise ValueError("Give one of --persona=FILE, --user=INDEX, --requests=FILE and --users=N.")
  if any(many) != (_OUTPUT.value is not None):
    raise ValueError("--requests or --users and --output go together; give both or neither.")
  if _USERS.value and config.data.path != "simulated":
    raise ValueError(
      f"--users are simulated, and config.data.path is {config.data.path!r}; give --requests=FILE, "
      "or a config of simulated data."
    )
  if _JUDGE_PERSONA.value and not _JUDGE.value:
    raise ValueError("--judge_persona is of Persona-judge; give --judge too.")
  if _JUDGE.value and not (_JUDGE_PERSONA.value or _REQUESTS.value):
    raise ValueError("--judge needs a second persona; give --judge_persona=FILE.")


def _sampling():
  """What the flags say; Persona-judge samples as its paper does where they do not."""
  from alignx_jax.inference import persona_judge
  from alignx_jax.inference.prompts import Sampling

  usual = {"temperature": 1.0, "top_k": 0, "top_p": 1.0}
  if _JUDGE.value:
    usual = {
      "temperature": persona_judge.TEMPERATURE,
      "top_k": persona_judge.TOP_K,
      "top_p": persona_judge.TOP_P,
    }
  given = {"temperature": _TEMPERATURE.value, "top_k": _TOP_K.value, "top_p": _TOP_P.value}
  given = {name: value for name, value in given.items() if value is not None}
  try:
    return Sampling(**usual | given, max_new_tokens=_MOST.value, seed=_SEED.value)
  except ValueError as error:
    raise ValueError(f"--{error}") from None


def _persona() -> dict:
  if _PERSONA.value:
    return _read_persona(_PERSONA.value)
  from alignx_jax.inference.requests import PERSONA_FIELDS
  from alignx_jax.personas.simulator import simulate_record

  record = simulate_record(_USER.value, split="test", seed=0)
  return {name: record[name] for name in PERSONA_FIELDS if name in record}


def _read_persona(path: str) -> dict:
  import json

  try:
    record = json.loads(Path(path).read_text(encoding="utf-8"))
  except ValueError as error:
    raise ValueError(f"{path} is not whole JSON ({error}); mend it.") from error
  if not isinstance(record, dict):
    raise ValueError(f"{path} holds a {type(record).__name__}; make it one object, a persona.")
  return record


def _posts():
  """Lines that are typed or piped in, up to an empty one."""
  while True:
    try:
      post = input("Post: " if sys.stdin.isatty() else "")
    except EOFError:
      return
    if not post.strip():
      return
    yield post


if __name__ == "__main__":
  command_line.run(main)
