"""Region sizes from data: how long a row's regions should be, and the padding to expect."""

import contextlib
import dataclasses
import itertools
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from tqdm import tqdm

from alignx_jax.data.formatting import Formatting, Refused
from alignx_jax.data.loader import Loader, choose
from alignx_jax.data.records import Example
from alignx_jax.data.rows import Regions

FILE = "regions.json"


def measure(examples: Sequence[Example], formatting: Formatting, *, sample: int) -> np.ndarray:
  """Tokens of each region that examples need, whatever the formatting's regions.

  Args:
    sample: so many examples, evenly spread.
  Returns:
    int [examples, S] of context, chosen and rejected, for a learned bridge also of the persona
    and its parts, without those that formatting refuses.
  """
  bridge = (1 << 30, 1 << 30) if formatting.condition == "bridge" else ()
  wide = dataclasses.replace(formatting, regions=Regions(1 << 30, 1 << 30, 1, *bridge))
  places = np.unique(np.linspace(0, len(examples) - 1, min(sample, len(examples))).astype(int))
  return _sizes(Loader(examples, wide, rows=1), places.tolist())


def pack(sizes: np.ndarray, regions: Regions, *, window: int) -> tuple[float, int]:
  """Packs examples of these sizes as the loader does.

  Returns:
    The share of a row's tokens that is padding, and the most examples that a row holds.
  """
  waiting, filled, rows, most = [], 0, 0, 0
  queue = iter(sizes.tolist())
  while True:
    waiting += [tuple(size) for size in itertools.islice(queue, window - len(waiting))]
    if len(waiting) < window and rows:
      break  # the last rows of a sample say little of those of a long stream
    if not waiting:
      break
    taken = choose(waiting, regions)
    filled += sum(sum(waiting[i]) for i in taken)
    rows, most = rows + 1, max(most, len(taken))
    waiting = [size for i, size in enumerate(waiting) if i not in taken]
  return 1 - filled / max(1, rows * regions.layout), most


def propose(sizes: np.ndarray, layout: int, *, window: int = 32) -> dict | None:
  """The regions of rows of about `layout` tokens that lose least to padding.

  The response region is chosen among multiples of 32 around the share of tokens that
  responses have, and holds all but one response in a thousand.

  Returns:
    {"context", "response", "examples", "padding", "refused", "shortened"}: sizes; the share of
    padding to expect; shares of examples that such rows refuse, and whose history they
    shorten. None if such rows are too short for most examples.
  """
  responses = sizes[:, 1:].max(axis=1)
  least = -(-int(np.quantile(responses, 0.999, method="higher")) // 32) * 32
  share = responses.sum() / (sizes[:, 0] + 2 * responses).sum()
  best = None
  for factor in (0.85, 0.92, 1.0, 1.08, 1.16, 1.25):
    response = max(least, round(factor * share * layout / 32) * 32)
    context = layout - 2 * response
    fits = (responses <= response) & (sizes[:, 0] <= context)
    if context <= 0 or fits.mean() < 0.5:
      continue
    regions = Regions(context, response, examples=1 << 30)
    # Long enough that what a window is left with has its effect.
    repeats = -(-100 * window // int(fits.sum()))
    rng = np.random.default_rng(0)
    stream = np.concatenate([rng.permutation(sizes[fits]) for _ in range(repeats)])
    padding, most = pack(stream, regions, window=window)
    found = {
      "context": context,
      "response": response,
      "examples": most,
      "padding": round(padding, 4),
      "refused": round(float((responses > response).mean()), 4),
      "shortened": round(float((sizes[:, 0] > context).mean()), 4),
    }
    if best is None or padding < best["padding"]:
      best = found
  return best


def fit_context(loader: Loader, *, least_rows: int = 32) -> Loader:
  """The same examples in rows with as short a context as suits them.

  Regions are chosen for personas. A list of preferences, few acts or no persona at all would
  leave most of such a row empty. The context is halved as often as it pays; the longest still
  fits, so nothing more is refused or dropped.

  Args:
    least_rows: stay as it is with fewer rows than that: other sizes are another program to compile.
  """
  regions = loader.formatting.regions
  sample = range(0, loader.stream_length, max(1, loader.stream_length // 32))
  if _sizes(loader, sample)[:, 0].max(initial=0) > regions.context // 2:
    return loader
  sizes = _sizes(loader, range(loader.stream_length))
  if len(sizes) < least_rows:
    return loader
  multiple = 128 if regions.context >= 1024 else 16  # so that a row divides by what it did before

  def cost(regions):
    """Rows' tokens for each that is not padding."""
    return 1 / (1 - pack(sizes, regions, window=loader.window)[0])

  best = regions
  if sizes.sum() * cost(regions) < least_rows * regions.layout:
    return loader
  for halvings in (1, 2, 3, 4):
    less = regions.context - (regions.context >> halvings)
    context = regions.context - less // multiple * multiple
    shorter = dataclasses.replace(regions, context=context)
    if sizes[:, 0].max() <= context and cost(shorter) < 0.9 * cost(best):
      best = shorter
  return dataclasses.replace(
    loader, formatting=dataclasses.replace(loader.formatting, regions=best)
  )


def _sizes(loader, positions) -> np.ndarray:
  """Tokens of each region that the examples at positions need, without those that are refused."""
  sizes = []
  for position in tqdm(positions, desc="measuring lengths", unit="ex", mininterval=1.0, delay=2.0):
    with contextlib.suppress(Refused):
      sizes.append(loader.tokenised(position)[1].sizes)
  return np.array(sizes, int).reshape(-1, len(loader.formatting.regions.room))


def write_proposals(
  directory: str | Path,
  splits: dict,
  formatting: Formatting,
  *,
  layouts: Sequence[int],
  sample: int,
) -> str:
  """Measures a prepared set and keeps what it proposes in its regions.json.

  Args:
    splits: the set's, of which the first is measured.
    formatting: as training tokenises; the conditions `persona` and `inferred` are measured.
    layouts: tokens of a row.
  Returns:
    The proposals as a table.
  """
  path = Path(directory) / FILE
  proposals = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
  examples = next(iter(splits.values()))
  lines = [f"{'row':>6} {'condition':<9} {'context':>8} {'response':>8} {'examples':>8}  padding"]
  for condition in ("persona", "inferred"):
    formatting = dataclasses.replace(formatting, condition=condition)
    sizes = measure(examples, formatting, sample=sample)
    if not len(sizes):
      lines.append(f"{'':>6} {condition:<9} no record can be formatted so")
      continue
    for layout in layouts:
      found = propose(sizes, layout)
      if found is None:
        lines.append(f"{layout:>6} {condition:<9} too short for most records")
        continue
      proposals.setdefault(_key(formatting), {})[str(layout)] = found
      lines.append(
        f"{layout:>6} {condition:<9} {found['context']:>8} {found['response']:>8} "
        f"{found['examples']:>8}  {found['padding']:.1%}"
        + f"; refuses {found['refused']:.2%}" * (found["refused"] > 0)
        + f"; shortens {found['shortened']:.2%} of the histories" * (found["shortened"] > 0)
      )
  path.write_text(json.dumps(proposals, indent=2) + "\n", encoding="utf-8")
  return "\n".join(lines)


def proposed_regions(directory: str | Path, formatting: Formatting, layout: str) -> Regions:
  """Regions that `write_proposals` found for rows of `layout` tokens.

  Raises:
    ValueError: there are none for this formatting; says what to run.
  """
  path = Path(directory) / FILE
  proposals = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
  found = proposals.get(_key(formatting), {})
  if layout not in found:
    raise ValueError(
      f"{path} proposes no regions for rows of {layout} tokens with this tokenizer, prompt, "
      f"history and condition (it has {', '.join(found) or 'none'}): run python -m "
      "alignx_jax.prepare_data again with its config.tokenizer, config.layouts, config.prompt "
      "and config.history set as here, or set config.regions by hand."
    )
  return Regions(**{name: found[layout][name] for name in ("context", "response", "examples")})


def _key(formatting: Formatting) -> str:
  """Names all that lengths depend on."""
  history = formatting.history
  return " ".join(
    [
      formatting.tokenizer.fingerprint[:16],
      formatting.chat,
      formatting.prompt,
      formatting.condition,
      f"{history.policy}:{history.items}",
      *history.kinds,
    ]
  )
