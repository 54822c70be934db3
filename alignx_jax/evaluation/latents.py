"""What a latent user variable has come to say, over the users of a test split.

A dimension in which the posterior has collapsed onto the prior says nothing of the user: its
divergence is 0, and its mean is the same for all.
"""

from collections.abc import Sequence

import numpy as np

ACTIVE = 0.01  # variance over users from which a dimension is active (Burda et al. 2016)


def latent_results(posterior_X2Z: np.ndarray) -> list[dict]:
  """One row for each dimension of z.

  Args:
    posterior_X2Z: mean and log-variance of each user; NaN where they could not be inferred.
  Returns:
    dicts of "dimension", "kl" (nats a user), "variance" of the mean over "users", "active".
  """
  known_X2Z = posterior_X2Z[np.isfinite(posterior_X2Z).all(axis=(1, 2))].astype(np.float64)
  mean_XZ, log_variance_XZ = known_X2Z[:, 0], known_X2Z[:, 1]
  kl_XZ = (mean_XZ**2 + np.expm1(log_variance_XZ) - log_variance_XZ) / 2
  variance_Z = mean_XZ.var(axis=0)
  return [
    {
      "dimension": z,
      "kl": float(kl_XZ[:, z].mean()),
      "variance": float(variance_Z[z]),
      "active": bool(variance_Z[z] > ACTIVE),
      "users": len(known_X2Z),
    }
    for z in range(mean_XZ.shape[1])
  ]


def summarise(results: Sequence[dict]) -> str:
  """How many dimensions are active and what they say, in a sentence or two."""
  active, kl = sum(row["active"] for row in results), sum(row["kl"] for row in results)
  told = (
    f"z: {active} of {len(results)} dimensions are active over {results[0]['users']} users "
    f"(variance of the mean above {ACTIVE}); its divergence from the prior is {kl:.2f} nats a user."
  )
  if not active:
    told += (
      " It has collapsed, and says nothing of anyone: lower config.latent.kl_weight, or raise "
      "config.latent.annealing_share."
    )
  return told
