"""Published files to a prepared data set: checked, sharded, with a data card.

  python -m alignx_jax.prepare_data --config=configs/prepare_data.py \\
    --config.name=p_soups --config.files="('friendly_unfriendly.json',)" --workdir=data/p_soups

The same command again goes on where it stopped. Bad records go to quarantine.jsonl with
file, row, field and reason; --strict stops at the first. The exit code is 2 when more than
config.max_bad_share of the rows are bad, or a file cannot be read to its end.
"""

import sys

from absl import flags

from alignx_jax import command_line

flags.adopt_module_key_flags(command_line)
_STRICT = flags.DEFINE_bool("strict", False, "Stop at the first bad record.")


def main(config, workdir):
  # Imported here, so that --help answers at once.
  from alignx_jax.data.data_card import format_card
  from alignx_jax.experiments.preparing import prepare, propose

  card = prepare(config, workdir, strict=_STRICT.value)
  print(format_card(card))
  if config.tokenizer:
    print(propose(config, workdir))
  share = card["refused"] / max(1, card["records"] + card["refused"])
  told = f"{workdir / 'quarantine.jsonl'} names each record."
  if card["damaged_files"]:
    sys.stderr.write(f"{', '.join(card['damaged_files'])} cannot be read to the end; {told}\n")
    sys.exit(2)
  if share > config.max_bad_share:
    sys.stderr.write(f"{share:.1%} of the rows are bad (config.max_bad_share); {told}\n")
    sys.exit(2)


if __name__ == "__main__":
  command_line.run(main)
