"""How much of a user one must know: accuracy by the number of acts that a policy sees.

  python -m alignx_jax.studies --config=configs/studies/history_length.py --workdir=runs/history

With --config.study.runs=runs/study it reads what `alignx_jax.study` trained there, or trains the
same, on users with three to five acts. Test users have more.
"""

from ml_collections import ConfigDict

from configs.studies import small_study


def get_config():
  config = small_study.get_config("history_length")
  study = config.study
  with config.unlocked():
    study.users = 300  # the most test pairs
    study.acts = (0, 1, 2, 4, 8, 16)
    study.comments = 16  # of a simulated test user
    study.pairs = 16
    # Of an evaluated row, which must hold sixteen pairs, or twelve users of whom little is known.
    study.regions = ConfigDict({"context": 1664, "response": 400, "examples": 12})
    study.regions.update({"prompt": 384, "persona": 1664, "parts": 64})
  return config
