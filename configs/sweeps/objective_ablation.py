"""How preferences reach the policy, and what of a persona is known: 12 trials, three seeds each.

  python -m alignx_jax.sweep --sweep=configs/sweeps/objective_ablation.py --workdir=runs/ablation

ICA reads the persona; PBA reads P̃, averaged from labels and told as text, or inferred by a learned
head without labels. Each is trained and tested with comments (UGC), compared pairs (PAIR), the
description (DEMO) or all of them. A description has no labels to average, so in its place ICA is
tried on UGC and PAIR, which is all that PBA as text sees. Expect PBA as text first, ICA next, and
more kinds to be better than one; with 320 users the head has not learned, and is near chance.
"""

from alignx_jax.sweeps.space import cross, grid, trial
from configs.sweeps import small

METHODS = {
  "ica": {"objective.name": "ica"},
  "pba text": {"objective.name": "pba", "bridge.kind": "text"},
  "pba head": {"objective.name": "pba", "bridge.kind": "head", "train.rows": 1},
}
PERSONAS = {
  "ugc": ("ugc",),
  "pair": ("pair",),
  "demo": ("demo",),
  "ugc+pair": ("ugc", "pair"),
  "all": ("ugc", "pair", "demo"),
}
TRIALS = [
  *(("ica", persona) for persona in PERSONAS),
  *(("pba text", persona) for persona in ("ugc", "pair", "all")),
  *(("pba head", persona) for persona in ("ugc", "pair", "demo", "all")),
]


def get_config():
  return small.get_config()


def get_sweep():
  for method, persona in TRIALS:
    kinds = {"history.kinds": PERSONAS[persona]}
    for overrides in cross([METHODS[method]], [kinds], grid({"seed": range(3)})):
      yield trial(overrides, {"method": method, "persona": persona, "seed": overrides["seed"]})
