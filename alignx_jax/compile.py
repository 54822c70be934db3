"""What a run needs on TPUs, told on a machine without one.

  python -m alignx_jax.compile --config=configs/X.py --workdir=DIR --topology=v5e:8x8

Compiles the training step, the reference pass, the evaluation step and, where a learned bridge
infers preferences, that pass for the topology and prints memory, FLOPs, exchanges and estimated
times; DIR/compile.json has the same numbers, of the training step at the top level, of all
programs under "programs". The exit code is 2 when one does not fit. --slices=2 is for several
slices, --save_text keeps the compiled programs.
"""

import json
import os
import sys

from absl import flags

from alignx_jax import command_line

flags.adopt_module_key_flags(command_line)

_TOPOLOGY = flags.DEFINE_string("topology", None, "Chip and shape, such as v5e:8x8.")
_SLICES = flags.DEFINE_integer("slices", 1, "Slices of that topology.")
_EXAMPLES = flags.DEFINE_float(
  "examples_per_row", 0, "Examples in a packed row, on average; 0: config.regions.examples."
)
_SAVE_TEXT = flags.DEFINE_bool("save_text", False, "Write the compiled programs to the workdir.")
flags.mark_flag_as_required("topology")


def main(config, workdir):
  # The computer's own TPU, if it has one, is left alone.
  os.environ["JAX_PLATFORMS"] = "cpu"
  from alignx_jax.ahead.advice import advice_text
  from alignx_jax.ahead.chips import parse_topology
  from alignx_jax.ahead.report import table
  from alignx_jax.experiments.compiling import compile_programs

  reports = compile_programs(
    config,
    parse_topology(_TOPOLOGY.value, slices=_SLICES.value),
    examples_per_row=_EXAMPLES.value,
    texts=workdir if _SAVE_TEXT.value else None,
  )
  workdir.mkdir(parents=True, exist_ok=True)
  text = json.dumps(reports["train"] | {"programs": reports}, indent=2)
  (workdir / "compile.json").write_text(text + "\n", encoding="utf-8")
  for report in reports.values():
    print(table(report))
    if report.get("advice"):
      print(advice_text(report, report["advice"]))
  if not _EXAMPLES.value:
    print("Examples are the most that the rows can hold; --examples_per_row tells the average.")
  if not all(report["fits"] for report in reports.values()):
    sys.exit(2)


if __name__ == "__main__":
  command_line.run(main)
