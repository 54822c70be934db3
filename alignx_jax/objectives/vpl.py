"""Variational preference learning (Poddar et al. 2024, arXiv 2408.10075), as a DPO loss.

The evidence lower bound of their eq. 4, with a policy in the place of a reward model: the loss of
an example is DPO's, of responses given z ~ q(z | the user's pairs), plus a weight times the
divergence of q from the prior. The weight rises from 0: at once, z would be unlearned before it
says anything.
"""

import dataclasses

import jax
import jax.numpy as jnp

from alignx_jax.models.latent import Posterior, encode
from alignx_jax.objectives.draws import draw_each
from alignx_jax.objectives.log_probs import response_log_probs


@dataclasses.dataclass(frozen=True)
class LatentObjective:
  """How a latent user variable is trained; hashable.

  Attributes:
    kl_weight: of the divergence, in nats a user.
    annealing_steps: in which the weight rises linearly from 0; 0 for no rise.
    seed: of the draws of z.
  """

  kl_weight: float
  annealing_steps: float
  seed: int

  @classmethod
  def of(cls, config, steps: int) -> "LatentObjective":
    """Of a config's `latent`, in a run of so many steps."""
    return cls(config.latent.kl_weight, config.latent.annealing_share * steps, config.seed)

  def weight_at(self, step):
    """The weight of the divergence at a step."""
    risen = jnp.minimum(step / self.annealing_steps, 1.0) if self.annealing_steps else 1.0
    return self.kl_weight * risen


def latent_log_probs(model, rows, objective: LatentObjective, step, *, chunk: int):
  """Response log-probs given a draw of z, and the divergence's part of the loss.

  Args:
    step: of the run, an int32 scalar.
  Returns:
    log-probs [B, N, E], the weighted divergence of each example [B, E], and metrics as
    (numerator, denominator) pairs: `kl` in nats a user, and of each dimension of z.
  """
  posterior = encode(model, rows)
  latent_BEZ = sample(posterior, objective.seed, step, rows.example_BE)
  log_probs_BNE = response_log_probs(model, rows, latent_BEZ=latent_BEZ, chunk=chunk)
  real_BE1 = rows.weight_BE[..., None] > 0
  kl_BEZ = jnp.where(real_BE1, divergence(*posterior), 0.0)
  users = jnp.sum(rows.weight_BE)
  weight = objective.weight_at(step)
  kl_Z = jnp.sum(kl_BEZ, axis=(0, 1))
  metrics = {"kl": (jnp.sum(kl_Z), users), "kl_weight": (users * weight, users)}
  metrics |= {f"kl_{z:02}": (kl, users) for z, kl in enumerate(kl_Z)}
  return log_probs_BNE, weight * jnp.sum(kl_BEZ, axis=-1), metrics


def sample(posterior: Posterior, seed: int, step, example_BE):
  """z = μ + σ ε [B, E, Z] (Kingma and Welling 2014, eq. 10): gradients reach μ and σ."""
  shape = posterior.mean_BEZ.shape[-1:]
  draw = lambda key: jax.random.normal(key, shape)
  noise_BEZ = draw_each(draw, seed, step, example_BE)
  return posterior.mean_BEZ + jnp.exp(posterior.log_variance_BEZ / 2) * noise_BEZ


def divergence(mean, log_variance):
  """KL(N(μ, σ²) ‖ N(0, 1)) in nats of each dimension: (μ² + σ² − 1 − log σ²) / 2."""
  return (mean**2 + jnp.expm1(log_variance) - log_variance) / 2
