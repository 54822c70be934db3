"""Where vocabularies come from: each source to (tokenizer.json dict, bos, eos).

The dict may also hold `vocab_size`; bos and eos are texts, ids or None.
"""

import json

END_OF_TURN = "<|im_end|>"
BYTES_SPECIALS = ("<|endoftext|>", "<|im_start|>", END_OF_TURN)  # ids 256, 257, 258


def bytes_spec():
  """A byte an id, and three specials; no merges."""
  vocab = {char: byte for byte, char in _bytes_to_unicode().items()}
  spec = {
    "added_tokens": [
      {"content": text, "id": id_, "special": True}
      for id_, text in enumerate(BYTES_SPECIALS, start=256)
    ],
    "pre_tokenizer": _byte_level(use_regex=False),
    "decoder": _byte_level(),
    "model": {"type": "BPE", "vocab": vocab, "merges": []},
  }
  return spec, BYTES_SPECIALS[0], END_OF_TURN


def json_spec(path):
  """A `tokenizer.json`, with what the files beside it say of bos and eos.

  Raises:
    ValueError: it is no such file, or several ids could be meant.
  """
  spec = _read_json(path)
  if not isinstance(spec.get("model"), dict) or "vocab" not in spec["model"]:
    raise ValueError(
      f"{path} is not a tokenizer.json (it holds no model.vocab): give the file "
      "that `tokenizers` writes"
    )
  beside = {
    name: _read_json(path.with_name(name)) if path.with_name(name).is_file() else {}
    for name in ("tokenizer_config.json", "generation_config.json", "config.json")
  }
  return spec, _special_beside("bos", beside, path), _special_beside("eos", beside, path)


def _special_beside(name, beside, path):
  """Text or id of bos or eos according to the files beside a tokenizer.json, or None."""
  config = beside["tokenizer_config.json"]
  token = config.get(f"{name}_token")
  if token is not None:
    return token["content"] if isinstance(token, dict) else token
  if name == "bos" and "bos_token" in config:
    return None  # Qwen: the tokenizer has none, whatever id config.json gives
  for file in ("generation_config.json", "config.json"):
    id_ = beside[file].get(f"{name}_token_id")
    if isinstance(id_, list) and len(id_) == 1:
      id_ = id_[0]
    if isinstance(id_, list):
      raise ValueError(
        f"{path.with_name(file)} gives several {name} ids, {id_}: put {name}_token "
        "in tokenizer_config.json"
      )
    if id_ is not None:
      return id_
  return None


def _read_json(path):
  try:
    content = json.loads(path.read_text(encoding="utf-8"))
  except ValueError as error:
    raise ValueError(f"{path} is not JSON ({error}): download it again") from error
  if not isinstance(content, dict):
    raise ValueError(
      f"{path} holds a JSON {type(content).__name__}, not an object: give the file "
      "that `tokenizers` writes"
    )
  return content


_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED = 1, 2, 3, 4  # tokenizer.ggml.token_type


def gguf_spec(path):
  """The vocabulary in a `.gguf` file; needs the extra `gguf`.

  Raises:
    ImportError: that is not installed.
    ValueError: the file is damaged, or its vocabulary is of a kind that is not known here.
  """
  try:
    import gguf
  except ImportError as error:
    raise ImportError(f"{path} needs the package gguf: pip install 'alignx_jax[gguf]'") from error
  try:
    fields = gguf.GGUFReader(path).fields
  except Exception as error:  # a short file raises whatever numpy meets first
    raise ValueError(f"{path} is not a GGUF file ({error}): download it again") from error

  def read(name, *, required=True):
    field = fields.get(f"tokenizer.ggml.{name}")
    if field is None and required:
      raise ValueError(
        f"{path} has no tokenizer.ggml.{name}: give a GGUF file that holds its tokenizer"
      )
    return None if field is None else field.contents()

  if read("model") != "gpt2":
    raise ValueError(
      f"{path}: tokenizer.ggml.model is {read('model')!r}: only gpt2 (byte-level "
      "BPE) is supported; a tokenizer.json of the model may be"
    )
  pre = read("pre")
  if pre not in _GGUF_PRE:
    raise ValueError(
      f"{path}: tokenizer.ggml.pre is {pre!r}: supported are {sorted(_GGUF_PRE)}; "
      "give the tokenizer.json of the model"
    )
  normalizer, pre_tokenizer, ignore_merges = _GGUF_PRE[pre]
  tokens, types = read("tokens"), read("token_type")
  typed = list(zip(tokens, types, range(len(tokens)), strict=True))
  spec = {
    "vocab_size": len(tokens),  # rows of padding at the end count
    "added_tokens": [
      {"content": text, "id": id_, "special": kind == _CONTROL}
      for text, kind, id_ in typed
      if kind in (_CONTROL, _USER_DEFINED)
    ],
    "normalizer": normalizer,
    "pre_tokenizer": pre_tokenizer,
    "decoder": _byte_level(),
    "model": {
      "type": "BPE",
      "vocab": {
        text: id_ for text, kind, id_ in typed if kind in (_NORMAL, _UNKNOWN, _USER_DEFINED)
      },
      "merges": read("merges"),
      "ignore_merges": ignore_merges,
    },
  }
  return spec, read("bos_token_id", required=False), read("eos_token_id", required=False)


def _byte_level(use_regex=True):
  return {
    "type": "ByteLevel",
    "add_prefix_space": False,
    "trim_offsets": True,
    "use_regex": use_regex,
  }


def _split_then_bytes(regex):
  split = {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False}
  return {"type": "Sequence", "pretokenizers": [split, _byte_level(use_regex=False)]}


_LLAMA3_REGEX = (
  r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
  r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2_REGEX = _LLAMA3_REGEX.replace(r"\p{N}{1,3}", r"\p{N}")

# tokenizer.ggml.pre to (normalizer, pre_tokenizer, ignore_merges) of the model's tokenizer.json.
_GGUF_PRE = {
  "gpt-2": (None, _byte_level(), False),
  "smollm": (
    None,
    {
      "type": "Sequence",
      "pretokenizers": [{"type": "Digits", "individual_digits": True}, _byte_level()],
    },
    False,
  ),
  "llama-bpe": (None, _split_then_bytes(_LLAMA3_REGEX), True),
  "qwen2": ({"type": "NFC"}, _split_then_bytes(_QWEN2_REGEX), False),
}


def _bytes_to_unicode() -> dict[int, str]:
  """GPT-2's printable character for each byte."""
  printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
  others = [byte for byte in range(256) if byte not in printable]
  return {byte: chr(byte) for byte in printable} | {
    byte: chr(256 + i) for i, byte in enumerate(others)
  }
