"""All four Hugging Face goldens: logits, DPO loss and gradients by torch and transformers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from alignx_jax.data.rows import Regions
from alignx_jax.models.pretrained import load_decoder
from alignx_jax.objectives.log_probs import (
  response_lengths,
  response_log_probs,
  token_log_probs,
)
from alignx_jax.objectives.losses import PreferenceLoss
from tests.packing import pack

NAMES = ("llama31", "smollm2", "qwen25", "mistral")


@pytest.fixture(params=NAMES, scope="module")
def golden(request, goldens):
  directory = goldens / "hf_goldens" / request.param
  return load_decoder(directory), np.load(directory / "golden.npz")


def test_logits_and_token_log_probs(golden):
  model, expected = golden
  for branch in ("chosen", "rejected"):
    tokens = np.concatenate([expected["context"], expected[branch]])[None]
    positions = np.arange(tokens.shape[1])[None]
    hidden = model(tokens, positions, np.ones_like(tokens))
    if branch == "chosen":
      logits = hidden @ model.head.T
      np.testing.assert_allclose(logits[0], expected["logits_context_chosen"], atol=1e-4)
    log_probs = token_log_probs(hidden[:, :-1], model.head, tokens[:, 1:], chunk=7)
    np.testing.assert_allclose(
      log_probs[0, -len(expected[branch]) :],
      expected[f"policy_{branch}_token_log_probs"],
      atol=1e-4,
    )


def test_packed_dpo_loss_and_gradients(golden):
  model, expected = golden
  beta = float(expected["beta"])
  ids = [expected[name].tolist() for name in ("context", "chosen", "rejected")]
  rows = pack([ids], Regions(context=100, response=20, examples=2))
  reference_BNE = np.zeros((1, 2, 2), np.float32)
  reference_BNE[0, :, 0] = expected["reference_log_probs"]
  graph, params = nnx.split(model)

  def loss(params):
    policy_BNE = response_log_probs(nnx.merge(graph, params), rows, chunk=8)
    lengths_BNE = response_lengths(rows)
    dpo = PreferenceLoss("sigmoid", beta)
    (numerator, denominator), _ = dpo(policy_BNE, reference_BNE, lengths_BNE, rows.weight_BE)
    return numerator / denominator, policy_BNE

  (value, policy_BNE), gradient = jax.value_and_grad(loss, has_aux=True)(params)
  np.testing.assert_allclose(policy_BNE[0, :, 0], expected["policy_log_probs"], rtol=1e-5)
  assert abs(value - expected["dpo_loss"]) < 1e-5

  leaves = jax.tree.leaves(gradient)
  norm = jnp.sqrt(sum(jnp.sum(g**2) for g in leaves))
  np.testing.assert_allclose(norm, expected["grad_global_norm"], rtol=1e-3)
  ours = {
    "embed_tokens": gradient["embedding_VD"][...],
    "layers.0.mlp.down_proj": gradient["blocks"]["down_FD"][...][0].T,
    "layers.1.self_attn.q_proj": gradient["blocks"]["q_DHA"][...][1].reshape(48, -1).T,
  }
  for name, value in ours.items():
    theirs = expected[f"grad:model.{name}.weight"]
    assert np.linalg.norm(value - theirs) < 1e-3 * np.linalg.norm(theirs), name
