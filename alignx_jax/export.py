"""Writes a trained workdir's newest checkpoint as a Hugging Face directory.

  python -m alignx_jax.export --config=configs/X.py --workdir=RUN --output=DIR

DIR then holds all that transformers and our own config.model.weights need: config.json,
safetensors, the tokenizer, generation_config.json. An adapter (config.lora) is merged into the
weights, and written to DIR/adapter as PEFT reads it too. A learned bridge, which no such format
has a place for, is written beside: bridge.safetensors, preference_space.json.
"""

from pathlib import Path

from absl import flags, logging

from alignx_jax import command_line

flags.adopt_module_key_flags(command_line)

_OUTPUT = flags.DEFINE_string("output", None, "The directory to write.")
flags.mark_flag_as_required("output")


def export(config, workdir: Path, output: Path) -> None:
  """Exports the newest checkpoint of a run of this config.

  Raises:
    FileNotFoundError, ValueError: there is no such run, or another config made it; or the output
      would overwrite the run's own files or those of its base.
  """
  # Imported here, so that --help answers at once.
  from flax import nnx

  from alignx_jax import experiment as experiments
  from alignx_jax.bridges import save_bridge, told_by
  from alignx_jax.config_checks import has_head, has_latent
  from alignx_jax.data.tokenizers import find_file
  from alignx_jax.models.lora import merge_lora
  from alignx_jax.models.peft import factors_of, save_adapter
  from alignx_jax.models.pretrained import save_decoder
  from alignx_jax.models.tokenizer_files import write_tokenizer_files
  from alignx_jax.training import hosts

  for name, taken in (("the workdir", workdir), ("the base model", config.model.weights)):
    if output.resolve() == Path(taken).resolve():
      raise ValueError(f"--output {output} is {name} itself; give another directory.")
  if has_latent(config):
    raise ValueError(
      "A policy that reads a latent user variable ('vpl') is no plain decoder: without its encoder "
      "it could not be used elsewhere, so it is not exported."
    )
  experiment = told_by(experiments.load_experiment(config))
  params = experiments.trained_params(experiment, workdir)
  model = nnx.merge(nnx.graphdef(experiment.model), params)
  named = config.model.tokenizer or config.model.weights
  source = None if named == "bytes" or named.startswith("preset:") else find_file(named)
  first = hosts.is_first()
  if first:
    write_tokenizer_files(
      output, experiment.formatting.tokenizer, source, max_positions=model.arch.max_positions
    )
  if first and config.lora.rank and config.bridge.start:
    logging.warning(
      "The adapter is not written by itself: it changes what config.bridge.start trained, which "
      "PEFT could not load. The merged weights are whole."
    )
  elif first and config.lora.rank:
    save_adapter(
      factors_of(model.blocks),
      model.arch,
      output / "adapter",
      rank=config.lora.rank,
      alpha=config.lora.alpha,
      base=config.model.weights,
    )
  if has_head(config):
    if first:
      save_bridge(model.bridge, experiment.space, output)
    del model.bridge
  merge_lora(model)  # of a model without an adapter, nothing
  save_decoder(model, output)


def main(config, workdir):
  from alignx_jax.training import hosts

  hosts.connect()
  output = Path(_OUTPUT.value)
  export(config, workdir, output)
  if hosts.is_first():
    print(f"Written: {output}")


if __name__ == "__main__":
  command_line.run(main)
