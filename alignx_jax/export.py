"""Writes a trained workdir's newest checkpoint as a Hugging Face directory.

  python -m alignx_jax.export --config=configs/X.py --workdir=RUN --output=DIR

DIR then holds all that transformers and our own config.model.weights need: config.json,
safetensors, the tokenizer, generation_config.json. An adapter (config.lora) is merged into the
weights, and written to DIR/adapter as PEFT reads it too. A learned bridge, which no such format
has a place for, is written beside: bridge.safetensors, preference_space.json.
"""

from pathlib import Path

from absl import flags

from alignx_jax import command_line

flags.adopt_module_key_flags(command_line)

_OUTPUT = flags.DEFINE_string("output", None, "The directory to write.")
flags.mark_flag_as_required("output")


def main(config, workdir):
  # Imported here, so that --help answers at once.
  from alignx_jax.experiments.export import export
  from alignx_jax.training import hosts

  hosts.connect()
  output = Path(_OUTPUT.value)
  export(config, workdir, output)
  if hosts.is_first():
    print(f"Written: {output}")


if __name__ == "__main__":
  command_line.run(main)
