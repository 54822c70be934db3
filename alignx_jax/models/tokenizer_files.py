"""What stands beside a model's weights in a Hugging Face directory, besides config.json."""

import shutil
from pathlib import Path

from alignx_jax.data.tokenizers import Tokenizer
from alignx_jax.models.gguf_file import chat_template
from alignx_jax.models.hugging_face import write_json

_FILES = (
  "tokenizer.json",
  "tokenizer_config.json",
  "special_tokens_map.json",
  "tokenizer.model",
  "chat_template.jinja",
  "generation_config.json",
)


def write_tokenizer_files(
  directory: str | Path, tokenizer: Tokenizer, source: Path | None, *, max_positions: int
) -> None:
  """Writes the tokenizer's files and generation_config.json as transformers reads them.

  What the source has is copied as it is. Where it has no such files, they are written from the
  tokenizer. Files of the same names that `directory` holds are replaced or removed, so that no
  other model's remain.

  Args:
    tokenizer: what was loaded from `source`.
    source: a model's directory, its tokenizer.json, a GGUF file, or None for a tokenizer that is
      in no file.
    max_positions: the longest sequence of the model.
  """
  directory = Path(directory)
  directory.mkdir(parents=True, exist_ok=True)
  beside = source.parent if source is not None and source.name == "tokenizer.json" else source
  if beside is not None and beside.resolve() == directory.resolve():
    return
  texts = {id_: text for text, id_ in tokenizer.special_ids.items()}
  for name in _FILES:
    (directory / name).unlink(missing_ok=True)
    if beside is not None and (beside / name).exists():
      shutil.copyfile(beside / name, directory / name)

  if not (directory / "tokenizer.json").exists():
    write_json(directory / "tokenizer.json", tokenizer.to_json())
    config = {
      "tokenizer_class": "PreTrainedTokenizerFast",
      "bos_token": texts.get(tokenizer.bos_id),
      "eos_token": texts[tokenizer.eos_id],
      "clean_up_tokenization_spaces": False,
      "model_max_length": max_positions,
    }
    write_json(directory / "tokenizer_config.json", config)
    gguf = source is not None and source.suffix == ".gguf"
    if gguf and (template := chat_template(source)) is not None:
      (directory / "chat_template.jinja").write_text(template, encoding="utf-8")
  if not (directory / "generation_config.json").exists():
    ids = {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id}
    write_json(directory / "generation_config.json", ids)
