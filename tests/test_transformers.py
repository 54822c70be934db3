"""What we write, read by the programs it is written for: transformers and PEFT.

pip install torch transformers peft && pytest -m slow tests/test_transformers.py
"""

import jax
import numpy as np
import pytest
from flax import nnx

from alignx_jax.data.tokenizers import load_tokenizer
from alignx_jax.inference.decoding import Generator
from alignx_jax.inference.prompts import Prompt, Sampling
from alignx_jax.models.decoder import Decoder
from alignx_jax.models.lora import add_lora, merge_lora
from alignx_jax.models.peft import factors_of, load_adapter, save_adapter
from alignx_jax.models.presets import PRESETS
from alignx_jax.models.pretrained import load_decoder, save_decoder
from alignx_jax.models.tokenizer_files import write_tokenizer_files
from alignx_jax.training import mesh as meshes

pytestmark = pytest.mark.slow

HOW = "pip install torch transformers"
TEXTS = (
  "The year 1984 had 366 days; 3.14159 and 10,000,000 are numbers.",
  "  Leading spaces,\ttabs\n\nand newlines \n",
  "Grüße, 世界! Привет 👩‍👩‍👧 e\u0301 é ﬁ ½",
  "def f(x):\n    return x**2  # it's, we'll, I'd",
  "a<|im_end|>b <|im_start|> user\n<|endoftext|>",
  "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n",
  "",
)


@pytest.fixture(scope="module")
def torch():
  return pytest.importorskip("torch", reason=HOW)


@pytest.fixture(scope="module")
def transformers(torch):
  return pytest.importorskip("transformers", reason=HOW)


def _logits(torch, model, tokens):
  with torch.no_grad():
    return model(torch.tensor(tokens)).logits.float().numpy()


def _our_logits(model, tokens):
  hidden = model(tokens, np.arange(tokens.shape[1])[None], np.ones_like(tokens))
  return np.asarray(hidden @ model.head.T)


@pytest.mark.parametrize("file_bytes", [2**30, 60_000])
@pytest.mark.parametrize("name", ["llama31", "smollm2", "qwen25", "mistral"])
def test_a_saved_golden_gives_its_logits(torch, transformers, goldens, tmp_path, name, file_bytes):
  directory = goldens / "hf_goldens" / name
  save_decoder(load_decoder(directory), tmp_path, file_bytes=file_bytes)
  model, told = transformers.AutoModelForCausalLM.from_pretrained(
    tmp_path, dtype="float32", output_loading_info=True
  )
  assert not any(told.values()), told
  expected = np.load(directory / "golden.npz")
  tokens = np.concatenate([expected["context"], expected["chosen"]])[None]
  logits = _logits(torch, model, tokens)[0]
  np.testing.assert_allclose(logits, expected["logits_context_chosen"], atol=1e-4)


@pytest.mark.parametrize("name", ["llama31", "smollm2", "qwen25", "mistral"])
def test_greedy_responses_are_those_of_generate(torch, transformers, goldens, name):
  directory = goldens / "hf_goldens" / name
  theirs = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype="float32")
  ours = load_decoder(directory)
  mesh = meshes.make_mesh(None, jax.devices()[:1])
  generator = Generator.of(ours, nnx.state(ours), mesh, stop_ids=(), rows=2)
  ids = np.load(directory / "golden.npz")["context"].tolist()
  greedy = Sampling(temperature=0.0, max_new_tokens=24)
  prompts = [Prompt(ids, greedy), Prompt(ids[: len(ids) // 2], greedy)]
  for i, answer in generator.generate(prompts):
    tokens = torch.tensor([prompts[i].ids])
    expected = theirs.generate(
      tokens,
      attention_mask=torch.ones_like(tokens),
      do_sample=False,
      max_new_tokens=24,
      eos_token_id=None,
      pad_token_id=0,
    )
    assert answer.ids == expected[0, tokens.shape[1] :].tolist()


def test_a_saved_preset_with_every_kind_of_parameter_gives_our_logits(
  torch, transformers, tmp_path
):
  ours = Decoder(PRESETS["tiny8"], rngs=nnx.Rngs(0))
  rng = np.random.default_rng(0)
  for name in ("q_bias_HA", "k_bias_KA", "v_bias_KA"):  # zero at the start
    bias = getattr(ours.blocks, name)
    bias[...] = rng.normal(size=bias.shape).astype(np.float32)
  save_decoder(ours, tmp_path)
  theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype="float32")
  tokens = rng.integers(320, size=(1, 200))  # beyond original_max_positions
  np.testing.assert_allclose(_logits(torch, theirs, tokens), _our_logits(ours, tokens), atol=1e-4)


@pytest.mark.parametrize("source", ["gguf", "bytes"])
def test_a_written_tokenizer_gives_our_ids(transformers, smollm2_path, tmp_path, source):
  path = smollm2_path if source == "gguf" else None
  ours = load_tokenizer(path or "bytes")
  save_decoder(Decoder(PRESETS["tiny"], rngs=nnx.Rngs(0)), tmp_path)
  write_tokenizer_files(tmp_path, ours, path, max_positions=8192)
  theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
  for text in TEXTS:
    # Theirs finds special tokens in any text, as ours does in a template.
    ids = ours.encode_pieces([(text, "template")])
    assert theirs(text)["input_ids"] == ids, text
    assert theirs.decode(ids, skip_special_tokens=False) == ours.decode(ids), text
  assert theirs.eos_token_id == ours.eos_id and theirs.bos_token_id == ours.bos_id
  again = load_tokenizer(tmp_path)
  assert (again.eos_id, again.bos_id, again.special_ids) == (
    ours.eos_id,
    ours.bos_id,
    ours.special_ids,
  )
  assert again.encode_batch(TEXTS) == ours.encode_batch(TEXTS)
  generation = transformers.GenerationConfig.from_pretrained(tmp_path)
  assert generation.eos_token_id == ours.eos_id


def test_the_chat_template_of_a_gguf_renders_as_our_chatml(transformers, smollm2_path, tmp_path):
  write_tokenizer_files(tmp_path, load_tokenizer(smollm2_path), smollm2_path, max_positions=8192)
  theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
  messages = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hi"}]
  assert theirs.apply_chat_template(messages, tokenize=False) == TEXTS[5]


def test_an_adapter_in_peft_gives_the_logits_of_the_merged_weights(
  torch, transformers, goldens, tmp_path
):
  peft = pytest.importorskip("peft", reason="pip install peft")
  base = goldens / "hf_goldens" / "qwen25"
  ours = load_decoder(base)
  add_lora(ours, rank=3, alpha=7.5, rngs=nnx.Rngs(0))
  rng = np.random.default_rng(0)
  for name in ("q_DHA", "k_DKA", "v_DKA", "o_HAD", "gate_DF", "up_DF", "down_FD"):
    factor = getattr(ours.blocks, f"{name}_lora_b")
    factor[...] = rng.normal(size=factor.shape).astype(np.float32)
  save_adapter(
    factors_of(ours.blocks), ours.arch, tmp_path / "ours", rank=3, alpha=7.5, base=str(base)
  )
  tokens = rng.integers(256, size=(1, 50))
  plain = transformers.AutoModelForCausalLM.from_pretrained(base, dtype="float32")
  before = _logits(torch, plain, tokens)
  adapted = peft.PeftModel.from_pretrained(plain, tmp_path / "ours")
  merge_lora(ours)
  logits = _our_logits(ours, tokens)
  assert np.abs(logits - before).max() > 0.1
  np.testing.assert_allclose(_logits(torch, adapted, tokens), logits, atol=1e-3, rtol=1e-4)

  # And what PEFT writes we read.
  adapted.save_pretrained(tmp_path / "theirs")
  ours_again, theirs = (load_adapter(tmp_path / n, ours.arch) for n in ("ours", "theirs"))
  assert (theirs.rank, theirs.alpha, theirs.base) == (3, 7.5, str(base))
  for name, pair in ours_again.factors.items():
    for x, y in zip(pair, theirs.factors[name], strict=True):
      np.testing.assert_array_equal(x, y)
