import json
import pickle
import sys

import pytest
import tokenizers as hf
from tokenizers import models, pre_tokenizers

from alignx_jax.data.tokenizers import load_tokenizer, train_bpe
from alignx_jax.data.vocabularies import BYTES_SPECIALS

SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
CORPUS = ["The cat sat on the mat, and the cat ate 1234 fish.\n", "naïve café 😀 the theme"] * 5
TEXTS = [
  "",
  " ",
  "Hello world",
  "  two  spaces\n\n\tand a tab \r\n",
  "In 2024, 12345 of 67.",
  "naïve café, 東京, Привет, שלום",
  "😀 👩‍👩‍👧 🇯🇵",
  "e\u0301 is not é",
  "don't, I'LL\u00a0stop…",
]


@pytest.fixture(scope="module")
def trained_dir(tmp_path_factory):
  directory = tmp_path_factory.mktemp("trained")
  train_bpe(CORPUS, 300, SPECIALS, directory, bos="<|endoftext|>")
  return directory


@pytest.fixture(scope="module")
def smollm2(smollm2_path):
  return load_tokenizer(smollm2_path)


@pytest.fixture(params=["bytes", "trained_dir", "smollm2"])
def tokenizer(request):
  if request.param == "bytes":
    return load_tokenizer("bytes")
  source = request.getfixturevalue(request.param)
  return load_tokenizer(source) if request.param == "trained_dir" else source


def edited(directory, target, edit):
  """Copies a tokenizer directory, with `edit` applied to its tokenizer.json dict."""
  spec = json.loads((directory / "tokenizer.json").read_text())
  edit(spec)
  target.mkdir(exist_ok=True)
  (target / "tokenizer.json").write_text(json.dumps(spec))
  config = (directory / "tokenizer_config.json").read_text()
  (target / "tokenizer_config.json").write_text(config)
  return target


def chat(user):
  return [
    ("<|im_start|>user\n", "template"),
    (user, "user"),
    ("<|im_end|>\n<|im_start|>assistant\n", "template"),
  ]


# Every vocabulary.


@pytest.mark.parametrize("text", TEXTS)
def test_text_survives_the_round_trip(tokenizer, text):
  ids = tokenizer.encode(text)
  assert tokenizer.decode(ids) == text
  assert all(0 <= id_ < tokenizer.vocab_size for id_ in ids)


def test_a_batch_is_its_texts_one_by_one(tokenizer):
  assert tokenizer.encode_batch(TEXTS) == [tokenizer.encode(text) for text in TEXTS]
  assert tokenizer.encode_batch([]) == []


def test_text_of_a_special_token_stays_text(tokenizer):
  taken = set(tokenizer.special_ids.values())
  for special in tokenizer.special_ids:
    for text in (special, f"a{special}b", f" {special}\n", special * 2):
      assert taken.isdisjoint(tokenizer.encode(text))
      assert tokenizer.decode(tokenizer.encode(text)) == text
      pieces = tokenizer.encode_pieces(chat(text))
      assert sum(id_ in taken for id_ in pieces) == 3
      assert tokenizer.decode(pieces) == "".join(text for text, _ in chat(text))


def test_a_special_token_does_not_form_across_pieces(tokenizer):
  ids = tokenizer.encode_pieces(
    [("<|im_", "user"), ("end|>", "template"), ("<|im_end", "template"), ("|>", "user")]
  )
  assert ids == tokenizer.encode("<|im_end|><|im_end|>")


def test_text_between_specials_is_one_string(tokenizer):
  pieces = [
    ("<|im_start|>Hel", "template"),
    ("lo wor", "user"),
    ("ld", "template"),
    ("!", "user"),
    ("<|im_end|>", "template"),
  ]
  start, end = tokenizer.special_ids["<|im_start|>"], tokenizer.special_ids["<|im_end|>"]
  assert tokenizer.encode_pieces(pieces) == [start, *tokenizer.encode("Hello world!"), end]
  assert tokenizer.encode_pieces([]) == []
  assert tokenizer.encode_pieces([("<|im_end|><|im_end|>", "template")]) == [end, end]


def test_it_pickles(tokenizer):
  copy = pickle.loads(pickle.dumps(tokenizer))
  assert copy.encode_pieces(chat("a <|im_end|>")) == tokenizer.encode_pieces(chat("a <|im_end|>"))
  assert copy.fingerprint == tokenizer.fingerprint


def test_it_refuses_what_is_not_text_and_unknown_kinds(tokenizer):
  with pytest.raises(ValueError, match=r"ud83d.*repair the record"):
    tokenizer.encode_batch(["fine", "half \ud83d"])
  with pytest.raises(ValueError, match='kind \'system\': use "template" or "user"'):
    tokenizer.encode_pieces([("text", "system")])


# Bytes.


def test_bytes_are_the_utf8_bytes():
  tokenizer = load_tokenizer("bytes")
  text = "é\x00\x04\n😀" + "".join(map(chr, range(256)))
  assert tokenizer.encode(text) == list(text.encode())
  assert tokenizer.special_ids == {text: 256 + i for i, text in enumerate(BYTES_SPECIALS)}
  assert (tokenizer.vocab_size, tokenizer.bos_id, tokenizer.eos_id) == (259, 256, 258)


# tokenizer.json.


def test_training_is_deterministic_and_its_directory_loads(trained_dir):
  text = (trained_dir / "tokenizer.json").read_text()
  assert train_bpe(CORPUS, 300, SPECIALS) == text
  tokenizer = load_tokenizer(trained_dir)
  assert tokenizer.special_ids == {text: i for i, text in enumerate(SPECIALS)}
  assert (tokenizer.vocab_size, tokenizer.bos_id, tokenizer.eos_id) == (300, 0, 2)
  assert load_tokenizer(trained_dir / "tokenizer.json").fingerprint == tokenizer.fingerprint
  assert len(tokenizer.encode(" the the")) == 2


def test_pieces_equal_the_whole_prompt_as_hf_tokenises_it(trained_dir):
  reference = hf.Tokenizer.from_file(str(trained_dir / "tokenizer.json"))
  tokenizer = load_tokenizer(trained_dir)
  for text in TEXTS:
    prompt = "".join(piece for piece, _ in chat(text))
    assert tokenizer.encode_pieces(chat(text)) == reference.encode(prompt).ids


def test_a_special_that_strips_whitespace_does_so_across_pieces(trained_dir, tmp_path):
  def strip(spec):
    spec["added_tokens"][1]["rstrip"] = True
    spec["added_tokens"][2]["lstrip"] = True

  directory = edited(trained_dir, tmp_path, strip)
  reference = hf.Tokenizer.from_file(str(directory / "tokenizer.json"))
  tokenizer = load_tokenizer(directory)
  for text in TEXTS:
    prompt = "".join(piece for piece, _ in chat(text))
    assert tokenizer.encode_pieces(chat(text)) == reference.encode(prompt).ids


def test_added_tokens_belong_to_templates_even_if_not_special(trained_dir, tmp_path):
  tool = {"id": 300, "content": "<tool_call>", "special": False}
  tokenizer = load_tokenizer(
    edited(trained_dir, tmp_path, lambda spec: spec["added_tokens"].append(tool))
  )
  assert tokenizer.vocab_size == 301
  assert tokenizer.encode_pieces([("<tool_call>", "template")]) == [300]
  assert 300 not in tokenizer.encode("<tool_call>")


@pytest.mark.parametrize("ignore_merges", [False, True])
def test_no_path_of_the_model_leads_to_a_special(trained_dir, tmp_path, ignore_merges):
  """A whole word by `ignore_merges`, a merge, and the unknown token: all three are cut."""

  def tempt(spec):
    spec["pre_tokenizer"]["use_regex"] = False
    spec["model"]["vocab"] |= {"###": 300, "##": 301}
    spec["model"]["merges"] += [["#", "#"], ["##", "#"]]
    spec["added_tokens"].append({"id": 300, "content": "###", "special": True})
    del spec["model"]["vocab"]["ÿ"], spec["model"]["vocab"]["Ą"]
    spec["model"] |= {"unk_token": "<|im_end|>", "ignore_merges": ignore_merges}

  tokenizer = load_tokenizer(edited(trained_dir, tmp_path, tempt))
  for text in ("###", "a ### b", "<|im_end|>", "a\x04b"):
    assert set(tokenizer.special_ids.values()).isdisjoint(tokenizer.encode(text))
  assert tokenizer.decode(tokenizer.encode("###")) == "###"
  assert tokenizer.encode_pieces([("###", "template")]) == [300]


def test_of_two_specials_that_begin_alike_the_longer_is_meant(trained_dir, tmp_path):
  added = [{"id": 300 + i, "content": "<tool" + "s" * i, "special": True} for i in range(3)]
  tokenizer = load_tokenizer(
    edited(trained_dir, tmp_path, lambda spec: spec["added_tokens"].extend(added))
  )
  assert tokenizer.encode_pieces([("<toolss<tool<tools", "template")]) == [302, 300, 301]


def test_an_added_token_that_merges_reach_is_ordinary(trained_dir, tmp_path):
  tokenizer = load_tokenizer(trained_dir)
  (the,) = tokenizer.encode(" the")
  added = {"id": the, "content": "Ġthe", "special": False}
  other = load_tokenizer(
    edited(trained_dir, tmp_path, lambda spec: spec["added_tokens"].append(added))
  )
  assert other.special_ids == tokenizer.special_ids
  assert other.encode(" the") == [the]


def test_post_processor_truncation_and_padding_are_off(trained_dir, tmp_path):
  def dress(spec):
    whole = hf.Tokenizer.from_str(json.dumps(spec))
    whole.post_processor = hf.processors.TemplateProcessing(
      single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)]
    )
    whole.enable_truncation(4)
    whole.enable_padding(length=64)
    spec |= json.loads(whole.to_str())

  dressed = load_tokenizer(edited(trained_dir, tmp_path, dress))
  for text in TEXTS:
    assert dressed.encode(text) == load_tokenizer(trained_dir).encode(text)


def test_the_normalizer_is_kept(trained_dir, tmp_path):
  nfc = load_tokenizer(
    edited(trained_dir, tmp_path, lambda spec: spec.update(normalizer={"type": "NFC"}))
  )
  assert nfc.encode("cafe\u0301") == nfc.encode("café")


def test_the_fingerprint_follows_what_changes_ids(trained_dir, tmp_path):
  def fingerprint(edit, **ids):
    return load_tokenizer(edited(trained_dir, tmp_path, edit), **ids).fingerprint

  def swap_merges(spec):
    merges = spec["model"]["merges"]
    merges[0], merges[1] = merges[1], merges[0]

  def merges_as_strings(spec):
    spec["model"]["merges"] = [" ".join(pair) for pair in spec["model"]["merges"]]

  same = load_tokenizer(trained_dir).fingerprint
  assert len(same) == 64 and int(same, 16)
  assert fingerprint(merges_as_strings) == same
  assert fingerprint(lambda spec: spec.update(truncation=None)) == same
  changed = [
    fingerprint(swap_merges),
    fingerprint(lambda spec: spec.update(normalizer={"type": "NFC"})),
    fingerprint(lambda spec: spec["pre_tokenizer"].update(use_regex=False)),
    fingerprint(lambda spec: spec["added_tokens"][0].update(content="<|other|>"), bos=0),
    fingerprint(lambda spec: None, eos=1),
  ]
  assert len({same, *changed}) == 1 + len(changed)


@pytest.mark.parametrize(
  "files, bos, eos",
  [
    (
      {
        "tokenizer_config.json": {"eos_token": {"content": "<|im_end|>"}, "bos_token": None},
        "config.json": {"bos_token_id": 0, "eos_token_id": 1},
      },
      None,
      2,
    ),
    ({"generation_config.json": {"eos_token_id": [1]}, "config.json": {"bos_token_id": 0}}, 0, 1),
    ({"config.json": {"eos_token_id": 2}}, None, 2),
  ],
)
def test_bos_and_eos_come_from_the_files_beside(trained_dir, tmp_path, files, bos, eos):
  (tmp_path / "tokenizer.json").write_text((trained_dir / "tokenizer.json").read_text())
  for name, content in files.items():
    (tmp_path / name).write_text(json.dumps(content))
  tokenizer = load_tokenizer(tmp_path)
  assert (tokenizer.bos_id, tokenizer.eos_id) == (bos, eos)
  given = load_tokenizer(tmp_path, bos="<|im_start|>", eos=0)
  assert (given.bos_id, given.eos_id) == (1, 0)


def test_errors_name_the_file_and_the_remedy(trained_dir, tmp_path):
  path = tmp_path / "tokenizer.json"
  text = (trained_dir / "tokenizer.json").read_text()

  def fails(content, match, error=ValueError, **ids):
    path.write_text(content)
    with pytest.raises(error, match=match) as info:
      load_tokenizer(tmp_path, **ids)
    assert str(path) in str(info.value)

  with pytest.raises(FileNotFoundError, match=r'tokenizer.json does not exist: give "bytes"'):
    load_tokenizer(tmp_path)
  with pytest.raises(FileNotFoundError, match="absent.gguf does not exist"):
    load_tokenizer(tmp_path / "absent.gguf")
  fails("not JSON", "is not JSON")
  fails("[]", "a JSON list, not an object")
  fails('{"architectures": []}', "no model.vocab")
  fails('{"model": {"type": "Unigram", "vocab": []}}', "Unigram model: only BPE")
  fails(
    '{"model": {"vocab": {}, "merges": []}, "pre_tokenizer": {"prepend_scheme": "first"}}',
    'prepend_scheme "first", which is not supported',
  )
  fails(
    '{"model": {"type": "BPE", "vocab": {"<e>": 0, "bc": 1}, "merges": [["b", "c"]]}}',
    "not a vocabulary that `tokenizers` can read",
    eos=0,
  )
  fails(text, "names no end-of-sequence token: pass eos=")
  fails(text, r"eos '<\|nope\|>' is not in the vocabulary", eos="<|nope|>")
  fails(text, "eos 999 is not in the vocabulary", eos=999)
  fails(text, "single character, which plain text needs", eos="Ċ")
  (tmp_path / "generation_config.json").write_text('{"eos_token_id": [1, 2]}')
  with pytest.raises(ValueError, match=r"generation_config.json gives several eos ids, \[1, 2\]"):
    load_tokenizer(tmp_path)


def test_training_refuses_sizes_and_names_that_do_not_fit():
  with pytest.raises(ValueError, match="need 259"):
    train_bpe(CORPUS, 258, SPECIALS)
  with pytest.raises(ValueError, match="not in special_tokens"):
    train_bpe(CORPUS, 300, ["<|endoftext|>"])


# GGUF.


def write_gguf(path, spec, *, pre="gpt-2", model="gpt2", eos=2):
  gguf = pytest.importorskip("gguf", reason="pip install 'alignx_jax[gguf]'")
  vocab = spec["model"]["vocab"]
  specials = {token["id"] for token in spec["added_tokens"]}
  writer = gguf.GGUFWriter(path, "llama")
  writer.add_tokenizer_model(model)
  writer.add_tokenizer_pre(pre)
  writer.add_token_list([*sorted(vocab, key=vocab.get), "[PAD]"])
  writer.add_token_types([3 if id_ in specials else 1 for id_ in range(len(vocab))] + [5])
  writer.add_token_merges([" ".join(pair) for pair in spec["model"]["merges"]])
  if eos is not None:
    writer.add_eos_token_id(eos)
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.close()
  return path


@pytest.fixture
def trained_spec(trained_dir):
  return json.loads((trained_dir / "tokenizer.json").read_text())


def test_gguf_gives_the_ids_of_tokenizer_json(trained_dir, trained_spec, tmp_path):
  from_gguf = load_tokenizer(write_gguf(tmp_path / "model.gguf", trained_spec))
  from_json = load_tokenizer(trained_dir)
  assert (from_gguf.vocab_size, from_gguf.bos_id, from_gguf.eos_id) == (301, None, 2)
  assert from_gguf.special_ids == from_json.special_ids
  assert from_gguf.encode_batch(TEXTS) == from_json.encode_batch(TEXTS)


@pytest.mark.parametrize(
  "pre, words",
  [
    ("gpt-2", ["I", "'ll", " pay", " 12345", "!!", "\n", "\n", "Now"]),
    ("smollm", ["I", "'ll", " pay", " ", "1", "2", "3", "4", "5", "!!", "\n", "\n", "Now"]),
    ("llama-bpe", ["I", "'ll", " pay", " ", "123", "45", "!!\n\n", "Now"]),
    ("qwen2", ["I", "'ll", " pay", " ", "1", "2", "3", "4", "5", "!!\n\n", "Now"]),
  ],
)
def test_gguf_pre_splits_words_as_the_model_does(trained_spec, tmp_path, pre, words):
  text = "I'll pay 12345!!\n\nNow"
  tokenizer = load_tokenizer(write_gguf(tmp_path / "model.gguf", trained_spec, pre=pre))
  split = tokenizer._model.pre_tokenizer.pre_tokenize_str(text)
  assert [text[start:end] for _, (start, end) in split] == words


def test_gguf_refuses_what_it_cannot_tokenise_rightly(trained_spec, tmp_path):
  path = tmp_path / "model.gguf"
  for match, options in [
    ("pre is 'tekken': supported are .*'llama-bpe', 'qwen2', 'smollm'", {"pre": "tekken"}),
    (r"model is 'llama': only gpt2 \(byte-level BPE\)", {"model": "llama"}),
    ("names no end-of-sequence token", {"eos": None}),
  ]:
    with pytest.raises(ValueError, match=match) as info:
      load_tokenizer(write_gguf(path, trained_spec, **options))
    assert str(path) in str(info.value)
  path.write_bytes(b"not a GGUF file, but long enough to be read as one")
  with pytest.raises(ValueError, match="model.gguf is not a GGUF file"):
    load_tokenizer(path)


def test_without_the_package_gguf_the_error_says_what_to_install(tmp_path, monkeypatch):
  monkeypatch.setitem(sys.modules, "gguf", None)
  (tmp_path / "model.gguf").write_bytes(b"GGUF")
  with pytest.raises(ImportError, match=r"pip install 'alignx_jax\[gguf\]'"):
    load_tokenizer(tmp_path / "model.gguf")


# SmolLM2's real vocabulary.


def test_smollm2_known_ids(smollm2):
  assert (smollm2.vocab_size, smollm2.bos_id, smollm2.eos_id) == (49152, 1, 2)
  assert len(smollm2.special_ids) == 17
  assert smollm2.encode("Hello world") == [19556, 905]
  assert smollm2.encode("12345") == [33, 34, 35, 36, 37]  # ids 17 on are "!" on, as in GPT-2
  assert smollm2.decode([smollm2.encode("!")[0] + i for i in range(94)]) == "".join(
    map(chr, range(ord("!"), ord("~") + 1))
  )
  # The ids that the chat template of SmolLM2-135M-Instruct is known by.
  prompt = (
    "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, "
    "trained by Hugging Face<|im_end|>\n"
  )
  assert smollm2.encode_pieces([(prompt, "template")]) == [
    1,
    9690,
    198,
    2683,
    359,
    253,
    5356,
    5646,
    11173,
    3365,
    3511,
    308,
    34519,
    28,
    7018,
    411,
    407,
    19712,
    8182,
    2,
    198,
  ]


def test_smollm2_pieces_equal_the_whole_prompt_as_hf_tokenises_it(smollm2, smollm2_path):
  import gguf

  fields = gguf.GGUFReader(smollm2_path).fields
  tokens = fields["tokenizer.ggml.tokens"].contents()
  reference = hf.Tokenizer(
    models.BPE(
      {text: i for i, text in enumerate(tokens)},
      [tuple(pair.split(" ")) for pair in fields["tokenizer.ggml.merges"].contents()],
    )
  )
  reference.pre_tokenizer = pre_tokenizers.Sequence(
    [
      pre_tokenizers.Digits(individual_digits=True),
      pre_tokenizers.ByteLevel(add_prefix_space=False),
    ]
  )
  reference.add_special_tokens(tokens[:17])
  for text in TEXTS:
    prompt = "".join(piece for piece, _ in chat(text))
    assert smollm2.encode_pieces(chat(text)) == reference.encode(prompt).ids


def test_smollm2_each_id_has_its_own_text(smollm2):
  """A token that is whole characters decodes to them, and its text encodes to something equal."""
  texts = [smollm2.decode([id_]) for id_ in range(smollm2.vocab_size)]
  whole = [text for text in texts if "\ufffd" not in text]
  assert len(whole) == len(set(whole)) > 48000
  again = smollm2.encode_batch(whole)
  assert [smollm2.decode(ids) for ids in again] == whole
  assert min(map(min, again)) > max(smollm2.special_ids.values())
