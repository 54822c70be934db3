"""Does a policy do what P̃ says: P̃ reversed, one dimension steered, the history's choices exchanged.

  python -m alignx_jax.studies --config=configs/studies/controllability.py --workdir=runs/control

With --config.study.runs=runs/study it reads what `alignx_jax.study` trained there, or trains the
same.
"""

from configs.studies import small_study


def get_config():
  return small_study.get_config("controllability")
