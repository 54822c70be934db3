"""How often one policy's answers are preferred to another's.

  python -m alignx_jax.win_rate --config=configs/X.py --first=ica.jsonl --second=base.jsonl \\
    --judge=simulated --output=win_rate.json

Both files are of alignx_jax.generate; answers to one request make a pair. What users are like comes
from the simulator, where they are the config's simulated users, or else from the requests that were
answered (--requests=FILE). Judges are

  simulated  the user's true preferences beside those that a response's words express
  model      which response the persona makes more probable to a model: the run in --workdir, or the
             base that the config names
  endpoint   a model behind an OpenAI-compatible chat endpoint, config.judge; its replies are kept
             beside the output, and the same command again asks only for what has none

Prints a table and writes JSON with every verdict. What is not paired or not judged is printed,
counted, and makes the exit code 2.
"""

import sys
from pathlib import Path

from absl import flags

from alignx_jax import command_line

flags.adopt_module_key_flags(command_line)

JUDGES = ("simulated", "model", "endpoint")
_FIRST = flags.DEFINE_string("first", None, "JSONL file of answers.", required=True)
_SECOND = flags.DEFINE_string("second", None, "JSONL file to compare with.", required=True)
_JUDGE = flags.DEFINE_enum("judge", None, JUDGES, "Who judges.", required=True)
_REQUESTS = flags.DEFINE_string("requests", None, "JSONL file of what was answered.")
_OUTPUT = flags.DEFINE_string("output", None, "JSON file of the win rate.", required=True)


def main(config, workdir):
  # Imported here, so that --help answers at once.
  from alignx_jax.evaluation.win_rate import format_win_rate
  from alignx_jax.experiments.judging import compare_files
  from alignx_jax.training import hosts

  hosts.connect()
  found = compare_files(
    config,
    Path(_FIRST.value),
    Path(_SECOND.value),
    Path(_OUTPUT.value),
    judge=_JUDGE.value,
    requests=Path(_REQUESTS.value) if _REQUESTS.value else None,
    workdir=workdir,
    tell=lambda text: print(text, file=sys.stderr),
  )
  print(format_win_rate(found.win_rate, found.judge))
  print(f"\n{found.summary}")
  if found.not_paired or found.win_rate.not_judged:
    sys.exit(2)


if __name__ == "__main__":
  command_line.run(main, requires=("config",))
