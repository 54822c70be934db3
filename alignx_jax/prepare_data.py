"""Published files to a prepared data set: checked, sharded, with a data card.

  python -m alignx_jax.prepare_data --config=configs/prepare_data.py \\
    --config.name=p_soups --config.files="('friendly_unfriendly.json',)" --workdir=data/p_soups

The same command again goes on where it stopped. Bad records go to quarantine.jsonl with
file, row, field and reason; --strict stops at the first. The exit code is 2 when more than
config.max_bad_share of the rows are bad, or a file cannot be read to its end.
"""

import functools
import os
import sys

from absl import flags

from alignx_jax import command_line

flags.adopt_module_key_flags(command_line)
_STRICT = flags.DEFINE_bool("strict", False, "Stop at the first bad record.")


def main(config, workdir):
  from alignx_jax.data import preparing
  from alignx_jax.data.alignx import get_config
  from alignx_jax.data.data_card import format_card

  names = ("seed", "validation_share", "max_characters", "max_history")
  workers = config.workers or os.cpu_count()
  engines = {
    "processes": functools.partial(preparing.run_in_processes, workers=workers),
    "beam": functools.partial(preparing.run_on_beam, options=config.beam_options),
  }
  if config.engine not in engines:
    raise ValueError(f"config.engine is {config.engine!r}; use {' or '.join(engines)}.")
  card = preparing.prepare(
    config.files,
    workdir,
    get_config(config.name, **{name: config[name] for name in names}),
    shard_records=config.shard_records,
    simulated=config.simulated if config.name == "simulated" else None,
    strict=_STRICT.value,
    run_all=engines[config.engine],
  )
  print(format_card(card))
  if config.tokenizer:
    print(_propose(config, workdir))
  share = card["refused"] / max(1, card["records"] + card["refused"])
  told = f"{workdir / 'quarantine.jsonl'} names each record."
  if card["damaged_files"]:
    sys.stderr.write(f"{', '.join(card['damaged_files'])} cannot be read to the end; {told}\n")
    sys.exit(2)
  if share > config.max_bad_share:
    sys.stderr.write(f"{share:.1%} of the rows are bad (config.max_bad_share); {told}\n")
    sys.exit(2)


def _propose(config, workdir) -> str:
  from alignx_jax.data.alignx import get_config
  from alignx_jax.data.formatting import Formatting
  from alignx_jax.data.prepared import open_prepared
  from alignx_jax.data.proposals import write_proposals
  from alignx_jax.data.rows import Regions
  from alignx_jax.data.tokenizers import load_tokenizer
  from alignx_jax.personas.persona import HistoryPolicy

  formatting = Formatting(
    tokenizer=load_tokenizer(config.tokenizer),
    space=get_config(config.name).space,
    regions=Regions(0, 0, 0),
    chat=config.prompt.chat,
    prompt=config.prompt.format,
    condition="persona",
    history=HistoryPolicy(**config.history),
  )
  return write_proposals(
    workdir,
    open_prepared(workdir),
    formatting,
    layouts=config.layouts,
    sample=config.measured,
  )


if __name__ == "__main__":
  command_line.run(main)
