"""Whatever a file or a user holds: read as data, or refused in a sentence; nothing else happens."""

import copy
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from flax import nnx
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from alignx_jax.data.records import parse_record, read_examples
from alignx_jax.models.decoder import Decoder
from alignx_jax.models.presets import get_architecture
from alignx_jax.models.pretrained import load_decoder, save_decoder
from alignx_jax.personas.preferences import alignx_space
from alignx_jax.personas.prompts import render_prompt, render_response, text_of
from alignx_jax.training.run_config import run_config
from configs import base
from tests.small_records import small_record
from tests.test_pretrained import _write_gguf, read_architecture

FUZZ = settings(
  max_examples=150,
  deadline=None,
  suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
JSON = st.recursive(
  st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
  lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
  max_leaves=12,
)
SPECIAL = ["<|im_end|>", "<|im_start|>", "<|eot_id|>", "<|begin_of_text|>", "{", "}", "{post}"]
TEXT = st.lists(st.text(max_size=8) | st.sampled_from(SPECIAL), max_size=6).map("".join)


# ------------------------------------------------------------------ records and prompts


@st.composite
def broken_records(draw):
  """A record of which something, somewhere, is another JSON value or gone."""
  record = copy.deepcopy(small_record(draw(st.integers(0, 5))))
  at = record
  while True:
    key = draw(st.sampled_from(sorted(at) if isinstance(at, dict) else range(len(at))))
    deeper = at[key]
    if isinstance(deeper, dict | list) and deeper and draw(st.booleans()):
      at = deeper
      continue
    if isinstance(at, dict) and draw(st.booleans()):
      del at[key]
    else:
      at[key] = draw(JSON)
    return record


@FUZZ
@given(record=broken_records() | st.dictionaries(st.text(), JSON) | JSON)
def test_a_record_is_read_or_refused_in_a_sentence(record):
  try:
    parse_record(record, alignx_space(), "records.json: record 3")
  except ValueError as error:
    assert "record 3" in str(error)


@FUZZ
@given(body=st.binary(max_size=200) | JSON.map(lambda value: json.dumps(value).encode()))
def test_a_file_of_records_is_read_or_refused_by_its_name(tmp_path, body):
  path = tmp_path / "records.json"
  path.write_bytes(body)
  try:
    read_examples(path, alignx_space())
  except ValueError as error:
    assert "records.json" in str(error)


@FUZZ
@given(texts=st.lists(TEXT, min_size=3, max_size=3), chat=st.sampled_from(["chatml", "llama3"]))
def test_what_users_write_is_never_read_as_markup(texts, chat):
  """Special tokens come from our own format alone, and the text is in the prompt as it is."""
  post, comment, response = texts
  record = small_record(0)
  record["User-Generated Content"][0]["comment"] = comment or "x"
  record |= {"prompt": post or "x", "chosen": response or "x"}
  try:
    example = parse_record(record, alignx_space(), "here")
  except ValueError:
    return  # nothing but spaces
  plain = parse_record(small_record(0), alignx_space(), "here")

  def rendered(example):
    prompt = render_prompt(example.post, chat=chat, prompt="default", persona=example.persona)
    return prompt, render_response(example.chosen, chat=chat, prompt="default")

  for pieces, usual in zip(rendered(example), rendered(plain), strict=True):
    markup = lambda pieces: [piece.text for piece in pieces if piece.kind == "template"]
    assert markup(pieces) == markup(usual)
    assert len(pieces) == len(usual)
  prompt = text_of(rendered(example)[0])
  assert example.post in prompt and example.persona.comments[0].comment in prompt


# ------------------------------------------------------------------ weights


@pytest.fixture(scope="module")
def models(tmp_path_factory):
  """A Hugging Face directory and a GGUF file of the same tiny model."""
  directory = tmp_path_factory.mktemp("models")
  model = Decoder(get_architecture("tiny"), rngs=nnx.Rngs(0))
  save_decoder(model, directory / "hf")
  _write_gguf(directory / "model.gguf", directory / "hf", read_architecture(directory / "hf"))
  return directory


def harmed(body: bytes, draw) -> bytes:
  """Cut short, or with some bytes changed, mostly where names and sizes stand."""
  body = bytearray(body)
  if draw(st.booleans()):
    return bytes(body[: draw(st.integers(0, len(body) - 1))])
  head = st.integers(0, min(4000, len(body) - 1)) | st.integers(0, len(body) - 1)
  for place in draw(st.lists(head, min_size=1, max_size=8)):
    body[place] = draw(st.integers(0, 255))
  return bytes(body)


@FUZZ
@given(data=st.data())
@pytest.mark.parametrize("file", ["hf/model.safetensors", "hf/config.json", "model.gguf"])
def test_damaged_weights_are_refused_or_have_their_shapes(models, tmp_path, file, data):
  source = models / file
  into = tmp_path / "model"
  shutil.rmtree(into, ignore_errors=True)
  shutil.copytree(models, into)
  (into / file).write_bytes(harmed(source.read_bytes(), data.draw))
  path = into / ("model.gguf" if file.endswith("gguf") else "hf")
  try:
    model = load_decoder(path)
  except (ValueError, FileNotFoundError) as error:
    assert str(path) in str(error)
    return
  D = model.arch.width
  assert np.asarray(model.embedding_VD[...]).shape == (model.arch.vocab_size, D)


# ------------------------------------------------------------------ configs


@FUZZ
@given(body=st.binary(max_size=100) | JSON.map(lambda value: json.dumps(value).encode()))
def test_the_config_of_a_run_is_read_or_refused_by_its_name(tmp_path, body):
  (tmp_path / "config.json").write_bytes(body)
  try:
    run_config(base.get_config(), Path(tmp_path))
  except ValueError as error:
    assert "config.json" in str(error)
