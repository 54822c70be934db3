"""What ICA and the learned bridge have to beat, on the simulated users of the study.

  python -m alignx_jax.baselines --config=configs/baselines_simulated.py --workdir=runs/baselines

Data, base and β are those of configs/study_simulated.py, and so are label averaging's fields.
Expect universal DPO at chance, as what one user wants another does not; label averaging, which is
given the labels, first; and VPL, which reads the one or two pairs of a user alone, between.
"""

from ml_collections import ConfigDict

from configs import study_simulated


def get_config():
  config = study_simulated.get_config()
  one = {"response": 52, "examples": 1}
  with config.unlocked():
    config.baselines = ConfigDict(
      {
        "dpo": {"regions": {"context": 40} | one, "train": {"rows": 8}},
        "pba": config.study.pba.to_dict(),
        "vpl": {
          "regions": {"prompt": 40, "persona": 192, "parts": 4} | one,
          "train": {"rows": 4},
          "optimizer": {"learning_rate": 7e-4},
          "latent": {"learning_rate": 4e-3},
        },
      }
    )
    del config.study
  config.eval.protocols = ("matched",)
  return config
