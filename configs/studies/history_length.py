"""How much of a user one must know: accuracy by the number of acts that a policy sees.

  python -m alignx_jax.studies --config=configs/studies/history_length.py --workdir=runs/history

With --config.studies.runs=runs/study it reads what `alignx_jax.study` trained there, or trains the
same, on users with three to five acts. Test users have more. The README shows what it printed.
"""

from ml_collections import ConfigDict

from configs.studies import small_study


def get_config():
  config = small_study.get_config("history_length")
  studies = config.studies
  with config.unlocked():
    studies.acts = (0, 1, 2, 4, 8, 16)
    studies.comments = 16  # of a simulated test user
    studies.pairs = 16
    # Of an evaluated row, which must hold sixteen pairs, or twelve users of whom little is known.
    studies.regions = ConfigDict({"context": 1664, "response": 400, "examples": 12})
    studies.regions.update({"prompt": 384, "persona": 1664, "parts": 64})
  return config
