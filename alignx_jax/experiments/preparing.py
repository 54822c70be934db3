"""A data set as a config of prepare_data says: prepared, and measured for its regions."""

import functools
import os
from pathlib import Path

from alignx_jax.data import preparing
from alignx_jax.data.alignx import get_config
from alignx_jax.data.formatting import Formatting
from alignx_jax.data.prepared import open_prepared
from alignx_jax.data.proposals import write_proposals
from alignx_jax.data.rows import Regions
from alignx_jax.data.tokenizers import load_tokenizer
from alignx_jax.personas.persona import HistoryPolicy


def prepare(config, workdir: Path, *, strict: bool = False) -> dict:
  """Prepares the set in the workdir, which is then config.data.path of a run.

  Args:
    strict: stop at the first bad record.
  Returns:
    The data card.
  Raises:
    ValueError: there is no such engine; or what data.preparing.prepare refuses.
  """
  names = ("seed", "validation_share", "max_characters", "max_history")
  workers = config.workers or os.cpu_count()
  engines = {
    "processes": functools.partial(preparing.run_in_processes, workers=workers),
    "beam": functools.partial(preparing.run_on_beam, options=config.beam_options),
  }
  if config.engine not in engines:
    raise ValueError(f"config.engine is {config.engine!r}; use {' or '.join(engines)}.")
  return preparing.prepare(
    config.files,
    workdir,
    get_config(config.name, **{name: config[name] for name in names}),
    shard_records=config.shard_records,
    simulated=config.simulated if config.name == "simulated" else None,
    strict=strict,
    run_all=engines[config.engine],
  )


def propose(config, workdir: Path) -> str:
  """Measures the prepared set and proposes regions for it; a table."""
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
