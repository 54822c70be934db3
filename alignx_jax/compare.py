"""Whether two evaluations on benchmarks differ by more than chance, on the very same pairs.

  python -m alignx_jax.compare --first=RUN_A --second=RUN_B
  python -m alignx_jax.compare --first=RUN_A --second=RUN_B --policy=ica,pba \\
    --condition=persona,inferred --protocol=matched

--first and --second are workdirs in which alignx_jax.evaluate measured benchmarks, or parquet files
of theirs; they may be the same. Compared are all figures that both have. --policy, --condition,
--protocol and --benchmark choose: one value is of both, FIRST,SECOND of each. Pairs are matched by
the ids of their records; which of them are left out is said.
"""

from absl import flags

from alignx_jax import command_line

_FIRST = flags.DEFINE_string("first", None, "Workdir or parquet file of an evaluation.")
_SECOND = flags.DEFINE_string("second", None, "Likewise, of what it is compared with.")
_CHOICES = {
  name: flags.DEFINE_list(name, [], f"The {name}, or that of the first and of the second.")
  for name in ("policy", "condition", "protocol", "benchmark")
}
flags.mark_flags_as_required(["first", "second"])


def main():
  # Imported here, so that --help answers at once.
  from alignx_jax.evaluation.comparison import compare_rows, format_comparisons, read_rows

  choices = {name: _choice(name, flag.value) for name, flag in _CHOICES.items()}
  rows = read_rows(_FIRST.value), read_rows(_SECOND.value)
  print(format_comparisons(compare_rows(*rows, **choices)))


def _choice(name: str, values: list[str]):
  if len(values) > 2:
    raise ValueError(f"--{name} has {len(values)} values; give one, or FIRST,SECOND.")
  return (values[0], values[-1]) if values else None


if __name__ == "__main__":
  command_line.run(main, requires=())
