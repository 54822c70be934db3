"""Weights in and out: Hugging Face directories both ways, whole and in shards, and GGUF in."""

import json
import os
import shutil
import socket
import struct
import subprocess
import sys

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from safetensors.numpy import load_file, save_file

from alignx_jax.data.tokenizers import load_tokenizer
from alignx_jax.models import hugging_face, tensors
from alignx_jax.models.decoder import Decoder
from alignx_jax.models.lora import add_lora
from alignx_jax.models.presets import PRESETS
from alignx_jax.models.pretrained import load_decoder, read_architecture, save_decoder
from alignx_jax.objectives.log_probs import token_log_probs

GOLDENS = ("llama31", "smollm2", "qwen25", "mistral")


@pytest.fixture(params=GOLDENS)
def golden(request, goldens):
  return goldens / "hf_goldens" / request.param


def _random_model(name, seed):
  """A preset with random values everywhere, biases and norms too."""
  graph, shapes = nnx.split(nnx.eval_shape(lambda: Decoder(PRESETS[name], rngs=nnx.Rngs(0))))
  rng = np.random.default_rng(seed)
  values = jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), x.dtype), shapes)
  return nnx.merge(graph, values)


@pytest.fixture(scope="module")
def models():
  """Three models by name; tiny and again are of one architecture."""
  return {
    "tiny": _random_model("tiny", 0),
    "again": _random_model("tiny", 1),
    "tiny8": _random_model("tiny8", 2),
  }


@pytest.fixture
def tiny(models, tmp_path):
  """A saved model's directory."""
  save_decoder(models["tiny"], tmp_path / "tiny")
  return tmp_path / "tiny"


def _assert_same_file_contents(directory, original):
  ours = {}
  for file in directory.glob("*.safetensors"):
    part = load_file(file)
    assert not ours.keys() & part.keys()
    ours |= part
  theirs = load_file(original / "model.safetensors")
  assert ours.keys() == theirs.keys()
  for key, value in theirs.items():
    assert ours[key].dtype == value.dtype
    np.testing.assert_array_equal(ours[key], value)


def _assert_same_model(a, b):
  assert a.arch == b.arch
  for x, y in zip(jax.tree.leaves(nnx.state(a)), jax.tree.leaves(nnx.state(b)), strict=True):
    assert x.dtype == y.dtype
    np.testing.assert_array_equal(x, y)


# ------------------------------------------------------------------ out and in again


@pytest.mark.parametrize("file_bytes", [2**30, 60_000, 1])
def test_saved_weights_are_those_that_were_loaded(golden, tmp_path, file_bytes):
  model = load_decoder(golden)
  save_decoder(model, tmp_path, file_bytes=file_bytes)
  _assert_same_file_contents(tmp_path, golden)
  _assert_same_model(load_decoder(tmp_path), model)
  assert read_architecture(tmp_path) == read_architecture(golden)


def test_a_large_model_is_written_in_files_of_the_size_asked_for(golden, tmp_path):
  save_decoder(load_decoder(golden), tmp_path, file_bytes=60_000)
  index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
  files = sorted(tmp_path.glob("*.safetensors"))
  assert len(files) > 3 and sorted(set(index["weight_map"].values())) == [f.name for f in files]
  assert files[0].name == f"model-00001-of-{len(files):05}.safetensors"
  assert {file.stat().st_mode for file in files} == {(tmp_path / "config.json").stat().st_mode}
  sizes = [sum(value.nbytes for value in load_file(file).values()) for file in files]
  assert max(sizes) <= 60_000 and sum(sizes) == index["metadata"]["total_size"]
  assert {path.name for path in tmp_path.iterdir()} == {
    "config.json",
    "model.safetensors.index.json",
    *(file.name for file in files),
  }


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_weights_keep_their_type_and_are_cast_when_asked(golden, tmp_path, dtype):
  exact = load_decoder(golden)
  save_decoder(load_decoder(golden, param_dtype=dtype), tmp_path)
  stored = load_file(tmp_path / "model.safetensors")
  assert {str(value.dtype) for value in stored.values()} == {dtype}
  assert json.loads((tmp_path / "config.json").read_text())["torch_dtype"] == dtype
  for x, y in zip(
    jax.tree.leaves(nnx.state(load_decoder(tmp_path, param_dtype="float32"))),
    jax.tree.leaves(nnx.state(exact)),
    strict=True,
  ):
    np.testing.assert_array_equal(x, np.asarray(y).astype(dtype).astype(np.float32))


def test_saving_replaces_a_model_with_other_files(models, tmp_path):
  small, other = models["tiny"], models["tiny8"]
  for model, file_bytes in ((small, 20_000), (other, 2**30), (small, 10_000), (other, 20_000)):
    save_decoder(model, tmp_path, file_bytes=file_bytes)
    _assert_same_model(load_decoder(tmp_path), model)


def test_a_save_that_is_cut_off_leaves_the_old_model(models, tmp_path, monkeypatch):
  save_decoder(models["tiny"], tmp_path, file_bytes=20_000)
  before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
  fetched = []

  def fails_late(name, value):
    fetched.append(name)
    if len(fetched) > 15:
      raise OSError("No space left on device")
    return tensors.as_stored(name, value)

  monkeypatch.setattr("alignx_jax.models.pretrained.as_stored", fails_late)
  with pytest.raises(OSError, match="No space"):
    save_decoder(models["again"], tmp_path, file_bytes=20_000)
  assert before == {path.name: path.read_bytes() for path in tmp_path.iterdir()}


def test_a_save_that_is_cut_off_while_files_are_moved_leaves_no_mixture(
  models, tmp_path, monkeypatch
):
  save_decoder(models["tiny"], tmp_path, file_bytes=20_000)
  moves = []

  def stops(source, target, replace=os.replace):
    moves.append(target)
    if len(moves) > 2:
      raise OSError("killed")
    replace(source, target)

  monkeypatch.setattr("os.replace", stops)
  with pytest.raises(OSError, match="killed"):
    save_decoder(models["again"], tmp_path, file_bytes=20_000)
  with pytest.raises(FileNotFoundError, match="neither model.safetensors nor"):
    load_decoder(tmp_path)


def test_no_more_than_a_files_tensors_are_on_the_host_at_once(models, tmp_path, monkeypatch):
  fetched = []
  monkeypatch.setattr(
    "alignx_jax.models.pretrained.as_stored",
    lambda name, value: fetched.append(value.nbytes) or tensors.as_stored(name, value),
  )
  held = []

  def save(values, *args, **kwargs):
    held.append(sum(fetched))
    fetched.clear()
    save_file(values, *args, **kwargs)

  monkeypatch.setattr(hugging_face, "save_file", save)
  save_decoder(models["tiny"], tmp_path, file_bytes=50_000)
  assert len(held) > 2 and max(held) <= 50_000


def test_a_model_with_an_adapter_is_not_saved_without_it(tmp_path):
  model = _random_model("tiny", 0)
  add_lora(model, rank=2, alpha=4, rngs=nnx.Rngs(2))
  with pytest.raises(ValueError, match="merge_lora"):
    save_decoder(model, tmp_path)


# ------------------------------------------------------------------ in shards


def _splitting(axis_from_end):
  """Splits one axis of each parameter over two devices, where it divides; else copies."""
  mesh = jax.make_mesh((2,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))

  def sharding(leaf):
    spec = [None] * leaf.ndim
    if axis_from_end <= leaf.ndim and leaf.shape[-axis_from_end] % 2 == 0:
      spec[-axis_from_end] = "x"
    return NamedSharding(mesh, P(*spec))

  return lambda params: jax.tree.map(sharding, params)


@pytest.mark.parametrize("axis_from_end", [1, 2, 3])
def test_a_model_read_in_shards_is_the_whole_one(golden, tmp_path, axis_from_end):
  whole = load_decoder(golden)
  shardings = _splitting(axis_from_end)
  split = load_decoder(golden, shardings=shardings)
  _assert_same_model(split, whole)
  wanted = jax.tree.leaves(shardings(nnx.state(whole)))
  got = [leaf.sharding for leaf in jax.tree.leaves(nnx.state(split))]
  assert got == wanted and any(not sharding.is_fully_replicated for sharding in got)
  save_decoder(split, tmp_path, file_bytes=60_000)
  _assert_same_file_contents(tmp_path, golden)


@pytest.mark.parametrize("axis_from_end", [1, 2, 3, 4])
def test_every_kind_of_parameter_is_read_in_shards(models, tmp_path, axis_from_end):
  model = models["tiny8"]
  save_decoder(model, tmp_path, file_bytes=50_000)
  split = load_decoder(tmp_path, shardings=_splitting(axis_from_end))
  _assert_same_model(split, model)
  long = [leaf for leaf in jax.tree.leaves(nnx.state(split)) if leaf.ndim >= axis_from_end]
  assert long and not any(leaf.sharding.is_fully_replicated for leaf in long)


def test_two_axes_split_over_both_devices(golden):
  mesh = jax.make_mesh((2, 1), ("x", "y"), axis_types=(jax.sharding.AxisType.Auto,) * 2)

  def sharding(leaf):
    fits = leaf.ndim > 2 and leaf.shape[1] % 2 == 0
    return NamedSharding(mesh, P(None, "x", "y") if fits else P())

  split = load_decoder(golden, shardings=lambda params: jax.tree.map(sharding, params))
  _assert_same_model(split, load_decoder(golden))


def test_each_device_reads_its_own_part_and_copies_are_read_once(golden, monkeypatch):
  read = []
  monkeypatch.setattr(
    "alignx_jax.models.pretrained.read_block",
    lambda source, name, index, dtype: (
      read.append(value := tensors.read_block(source, name, index, dtype)) or value
    ),
  )
  model = load_decoder(golden, shardings=_splitting(1), param_dtype="bfloat16")
  size = sum(leaf.nbytes for leaf in jax.tree.leaves(nnx.state(model)))
  assert sum(value.nbytes for value in read) == size
  assert {str(value.dtype) for value in read} == {"bfloat16"}
  assert all(isinstance(value, np.ndarray) for value in read)


EIGHT = """
import sys, jax, numpy as np
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec as P
from alignx_jax.models import pretrained, tensors

read = []

def read_block(*arguments):
  read.append(tensors.read_block(*arguments))
  return read[-1]

pretrained.read_block = read_block
whole = nnx.state(pretrained.load_decoder(sys.argv[1]))
read.clear()
mesh = jax.make_mesh((2, 2, 2), ("a", "b", "c"), axis_types=(jax.sharding.AxisType.Auto,) * 3)

def sharding(leaf):
  return NamedSharding(mesh, P(None, "a", "b", None) if leaf.ndim == 4 else P())

split = pretrained.load_decoder(sys.argv[1], shardings=lambda tree: jax.tree.map(sharding, tree))
jax.tree.map(np.testing.assert_array_equal, nnx.state(split), whole)
print(sum(x.nbytes for x in jax.tree.leaves(whole)) - sum(x.nbytes for x in read))
"""


def test_of_eight_devices_those_with_the_same_part_share_one_reading(models, tmp_path):
  save_decoder(models["tiny8"], tmp_path)
  done = subprocess.run(
    [sys.executable, "-c", EIGHT, tmp_path],
    env=os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=8"},
    capture_output=True,
    text=True,
    timeout=240,
  )
  assert done.stdout == "0\n", done.stderr[-3000:]


PROCESS = """
import sys, jax
from jax.sharding import NamedSharding, PartitionSpec as P
from alignx_jax.models.pretrained import load_decoder, save_decoder

jax.config.update("jax_cpu_collectives_implementation", "gloo")
coordinator, index, source, target = sys.argv[1:]
jax.distributed.initialize(coordinator, num_processes=2, process_id=int(index))
mesh = jax.make_mesh((2,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))

def sharding(leaf):
  return NamedSharding(mesh, P(*[None] * (leaf.ndim - 1), "x"))

model = load_decoder(source, shardings=lambda params: jax.tree.map(sharding, params))
assert not model.embedding_VD[...].is_fully_addressable
save_decoder(model, target, file_bytes=60_000)
"""


def test_processes_that_hold_a_part_each_read_and_write_one_model(goldens, tmp_path):
  source = goldens / "hf_goldens" / "llama31"
  with socket.socket() as free:
    free.bind(("localhost", 0))
    coordinator = f"localhost:{free.getsockname()[1]}"
  environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=1"}
  processes = [
    subprocess.Popen(
      [sys.executable, "-c", PROCESS, coordinator, str(i), source, tmp_path],
      env=environment,
      stderr=subprocess.PIPE,
      text=True,
    )
    for i in range(2)
  ]
  for process in processes:
    _, told = process.communicate(timeout=240)
    assert process.returncode == 0, told[-3000:]
  _assert_same_file_contents(tmp_path, source)
  _assert_same_model(load_decoder(tmp_path), load_decoder(source))


# ------------------------------------------------------------------ damaged and hostile


def test_missing_foreign_and_misshapen_tensors_are_named_before_any_is_read(tiny, monkeypatch):
  file = tiny / "model.safetensors"
  whole = load_file(file)
  monkeypatch.setattr("alignx_jax.models.pretrained.read_block", lambda *_: pytest.fail("read"))

  def refused(match, **changes):
    save_file({k: v for k, v in (whole | changes).items() if v is not None}, file)
    with pytest.raises(ValueError, match=match):
      load_decoder(tiny)

  refused("1 tensors are missing, the first is 'model.norm.weight'", **{"model.norm.weight": None})
  refused("no place.*layers.0.extra", **{"model.layers.0.extra.weight": np.ones(3, np.float32)})
  refused("no place.*o_proj.bias", **{"model.layers.1.self_attn.o_proj.bias": np.ones(32)})
  name = "model.layers.1.mlp.up_proj.weight"
  refused(rf"{name}' has shape \[3, 3\]; expected \[64, 32\]", **{name: np.ones((3, 3))})
  refused(rf"{name}' has shape \[32, 64\]; expected \[64, 32\]", **{name: np.ones((32, 64))})
  refused(rf"{name}' is of type I8", **{name: np.ones((64, 32), np.int8)})


def test_a_head_beside_tied_embeddings_and_old_frequencies_are_left_aside(tiny):
  file = tiny / "model.safetensors"
  save_file(
    load_file(file)
    | {
      "lm_head.weight": np.ones((300, 32), np.float32),
      "model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(4, np.float32),
    },
    file,
  )
  assert load_decoder(tiny).arch == PRESETS["tiny"]


GOOD = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.mark.parametrize(
  ("header", "length"),
  [
    ({"a": GOOD, "b": GOOD | {"data_offsets": [4, 12]}}, None),  # overlap
    ({"a": GOOD, "b": GOOD | {"data_offsets": [8, 1 << 40], "shape": [1 << 38]}}, None),
    ({"a": GOOD | {"data_offsets": [-8, 0]}}, None),
    ({"a": GOOD | {"shape": [3]}}, None),  # size is not shape × type
    ({"a": GOOD | {"shape": [1 << 62, 1 << 62]}}, None),
    ({"a": GOOD | {"dtype": "F33"}}, None),
    ({"a": GOOD}, None),  # leaves bytes without an owner
    ([GOOD], None),
    ({"a": GOOD}, 1 << 20),  # longer than the file
    ({"a": GOOD}, 200_000_000),
    ({"a": GOOD}, 1 << 63),
    (b"{", None),
    (b"[" * 100_000, None),
    (b'{"\xff": 1}', None),
  ],
)
def test_a_hostile_header_is_refused_with_the_file_and_its_size(tiny, header, length):
  text = header if isinstance(header, bytes) else json.dumps(header).encode()
  file = tiny / "model.safetensors"
  file.write_bytes(struct.pack("<Q", length or len(text)) + text + bytes(16))
  with pytest.raises(ValueError, match=f"{file} of {file.stat().st_size:,} bytes is damaged"):
    load_decoder(tiny)


@pytest.mark.parametrize("size", [0, 5, 100, -1])
def test_a_truncated_file_is_refused(tiny, size):
  file = tiny / "model.safetensors"
  file.write_bytes(file.read_bytes()[:size])
  with pytest.raises(ValueError, match="model.safetensors of .* bytes is damaged"):
    load_decoder(tiny)


def test_more_layers_than_tensors_are_refused_without_counting_them_out(tiny):
  config = json.loads((tiny / "config.json").read_text())
  (tiny / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 10**15}))
  with pytest.raises(ValueError, match="should have 1000000000000000 layers and holds 20 tensors"):
    load_decoder(tiny)


@pytest.mark.parametrize(
  "name",
  ["../model.safetensors", "/etc/x.safetensors", "a\\b.safetensors", "c:x.safetensors", "", ".."]
  + ["model.bin", "x\0.safetensors", 3, None, ["model.safetensors"]],
)
def test_an_index_names_files_in_its_directory_and_no_others(models, tmp_path, name):
  save_decoder(models["tiny"], tmp_path, file_bytes=50_000)
  file = tmp_path / "model.safetensors.index.json"
  index = json.loads(file.read_text())
  index["weight_map"]["model.norm.weight"] = name
  file.write_text(json.dumps(index))
  with pytest.raises(ValueError, match="'model.norm.weight' is in .* names no safetensors file"):
    load_decoder(tmp_path)


def test_a_damaged_index_or_a_missing_shard_is_refused(models, tmp_path):
  save_decoder(models["tiny"], tmp_path, file_bytes=50_000)
  file = tmp_path / "model.safetensors.index.json"
  index = json.loads(file.read_text())
  shards = sorted(tmp_path.glob("model-*.safetensors"))
  for text, message in (
    ("[1, 2]", "holds a list, not an object"),
    ('{"weight_map": ', "is not whole JSON"),
    ('{"weight_map": [1]}', "has no 'weight_map'"),
    ("[" * 100_000, "is not whole JSON"),
  ):
    file.write_text(text)
    with pytest.raises(ValueError, match=f"index.json {message}"):
      load_decoder(tmp_path)
  moved = index["weight_map"] | {"model.norm.weight": shards[0].name}
  file.write_text(json.dumps({"weight_map": moved}))
  with pytest.raises(ValueError, match=f"{shards[0].name} does not hold 'model.norm.weight'"):
    load_decoder(tmp_path)
  fewer = {key: name for key, name in index["weight_map"].items() if key != "model.norm.weight"}
  file.write_text(json.dumps({"weight_map": fewer}))
  with pytest.raises(ValueError, match="'model.norm.weight'"):
    load_decoder(tmp_path)
  file.write_text(json.dumps(index))
  shards[1].unlink()
  with pytest.raises(FileNotFoundError, match=f"lacks 1 of the {len(shards)} files.*00002-of"):
    load_decoder(tmp_path)


def test_a_directory_without_weights_or_with_pickled_ones_is_refused(tiny):
  (tiny / "model.safetensors").unlink()
  with pytest.raises(FileNotFoundError, match="neither model.safetensors nor"):
    load_decoder(tiny)
  (tiny / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'exit 1'\ntR.")
  with pytest.raises(ValueError, match="pickled weights only.*convert them to safetensors"):
    load_decoder(tiny)
  (tiny / "config.json").unlink()
  with pytest.raises(FileNotFoundError, match="config.json does not exist"):
    load_decoder(tiny)


def test_a_download_cache_of_links_is_read(golden, tmp_path):
  blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshot"
  blobs.mkdir()
  snapshot.mkdir()
  for i, name in enumerate(("config.json", "model.safetensors")):
    shutil.copyfile(golden / name, blobs / str(i))
    (snapshot / name).symlink_to(f"../blobs/{i}")
  _assert_same_model(load_decoder(snapshot), load_decoder(golden))


# ------------------------------------------------------------------ GGUF


def _write_gguf(path, directory, arch):
  """A Hugging Face Llama as llama.cpp's converter writes it, written from its description."""
  names = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
  }
  parts = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
  }
  writer = gguf.GGUFWriter(path, "llama")
  writer.add_context_length(arch.max_positions)
  writer.add_embedding_length(arch.width)
  writer.add_block_count(arch.layers)
  writer.add_feed_forward_length(arch.feed_forward)
  writer.add_head_count(arch.heads)
  writer.add_head_count_kv(arch.kv_heads)
  writer.add_rope_freq_base(arch.rope_theta)
  writer.add_layer_norm_rms_eps(arch.norm_epsilon)
  for name, value in load_file(directory / "model.safetensors").items():
    if name.startswith("model.layers."):
      _, _, layer, part = name.split(".", 3)
      stored = f"blk.{layer}.{parts[part.removesuffix('.weight')]}.weight"
    else:
      stored = names[name]
    count = {"q_proj": arch.heads, "k_proj": arch.kv_heads}.get(name.split(".")[-2])
    if count:
      # Pairs (i, i + A/2) of each head become neighbours.
      half = value.shape[0] // count // 2
      order = np.arange(count * 2 * half).reshape(count, 2, half).swapaxes(1, 2).reshape(-1)
      value = value[order]
    writer.add_tensor(stored, np.ascontiguousarray(value))
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.write_tensors_to_file()
  writer.close()
  return path


@pytest.fixture
def gguf_file(goldens, tmp_path):
  directory = goldens / "hf_goldens" / "smollm2"
  return _write_gguf(tmp_path / "model.gguf", directory, read_architecture(directory))


def test_gguf_gives_the_logits_of_the_model_it_was_made_from(goldens, gguf_file):
  directory = goldens / "hf_goldens" / "smollm2"
  model = load_decoder(gguf_file)
  assert model.arch == read_architecture(directory)
  expected = np.load(directory / "golden.npz")
  tokens = np.concatenate([expected["context"], expected["chosen"]])[None]
  hidden = model(tokens, np.arange(tokens.shape[1])[None], np.ones_like(tokens))
  np.testing.assert_allclose(
    (hidden @ model.head.T)[0], expected["logits_context_chosen"], atol=1e-4
  )


@pytest.mark.parametrize("axis_from_end", [1, 2, 3])
def test_gguf_is_read_in_shards(gguf_file, axis_from_end):
  split = load_decoder(gguf_file, shardings=_splitting(axis_from_end))
  _assert_same_model(split, load_decoder(gguf_file))
  assert any(not leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(nnx.state(split)))


def test_a_damaged_gguf_is_refused_with_the_file_and_its_size(gguf_file):
  whole = gguf_file.read_bytes()
  rng = np.random.default_rng(0)
  header = whole[:2000]  # names, types and offsets: where damage can lead astray
  for _ in range(40):
    damaged = bytearray(whole)
    damaged[int(rng.integers(len(header)))] ^= int(rng.integers(1, 256))
    gguf_file.write_bytes(damaged)
    try:
      load_decoder(gguf_file)
    except ValueError as error:
      assert str(gguf_file) in str(error)
  for size in (0, 3, 30, 500, 3000, len(whole) - 1):
    gguf_file.write_bytes(whole[:size])
    with pytest.raises(ValueError, match=f"model.gguf of {size:,} bytes is no whole GGUF"):
      load_decoder(gguf_file)


@pytest.mark.slow
def test_smollm2_reads_english(smollm2_path):
  model, tokenizer = load_decoder(smollm2_path), load_tokenizer(smollm2_path)
  assert model.arch == PRESETS["smollm2_135m"]

  @jax.jit
  def mean_log_prob(params, tokens):
    model_ = nnx.merge(nnx.graphdef(model), params)
    positions = np.arange(tokens.shape[1])[None]
    hidden = model_(tokens, positions, jnp.ones_like(tokens))
    return token_log_probs(hidden[:, :-1], model_.head, tokens[:, 1:]).mean()

  text = (
    "The capital of France is Paris. The capital of Italy is Rome, and that of Spain is Madrid."
  )
  tokens = np.asarray([tokenizer.encode(text)])
  shuffled = np.random.default_rng(0).permutation(tokens[0])[None]
  params = nnx.state(model)
  # Under 2 nats a token: with q and k left interleaved it is far above.
  assert mean_log_prob(params, tokens) > -2.0
  assert mean_log_prob(params, shuffled) < -4.0
