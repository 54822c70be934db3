"""A run as a Hugging Face directory: weights, tokenizer, adapter, bridge."""

from pathlib import Path

from absl import logging
from flax import nnx

from alignx_jax.data.tokenizers import find_file
from alignx_jax.experiments import experiment as experiments
from alignx_jax.experiments.bridges import save_bridge, told_by
from alignx_jax.experiments.config_checks import has_head, has_latent
from alignx_jax.models.lora import merge_lora
from alignx_jax.models.peft import factors_of, save_adapter
from alignx_jax.models.pretrained import save_decoder
from alignx_jax.models.tokenizer_files import write_tokenizer_files
from alignx_jax.training import hosts


def export(config, workdir: Path, output: Path) -> None:
  """Exports the newest checkpoint of a run of this config.

  Raises:
    FileNotFoundError, ValueError: there is no such run, or another config made it; or the output
      would overwrite the run's own files or those of its base.
  """
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
