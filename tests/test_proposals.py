"""Region sizes proposed from data: what they promise is what the loader gives."""

import numpy as np
import pytest

from alignx_jax.data.formatting import Formatting
from alignx_jax.data.loader import Loader
from alignx_jax.data.proposals import (
  fit_context,
  measure,
  pack,
  propose,
  proposed_regions,
  write_proposals,
)
from alignx_jax.data.records import parse_record
from alignx_jax.data.rows import Regions
from alignx_jax.data.tokenizers import load_tokenizer
from alignx_jax.personas.persona import HistoryPolicy
from alignx_jax.personas.preferences import alignx_space
from alignx_jax.personas.prompts import render_parts
from alignx_jax.personas.simulator import simulate_record

SPACE = alignx_space()


@pytest.fixture(scope="module")
def users():
  records = [simulate_record(i, split="train", seed=2) for i in range(300)]
  return [parse_record(record, SPACE, f"users:{i}") for i, record in enumerate(records)]


def formatting(**changes):
  fields = {
    "tokenizer": load_tokenizer("bytes"),
    "space": SPACE,
    "regions": Regions(0, 0, 0),
    "chat": "chatml",
    "prompt": "default",
    "condition": "persona",
    "history": HistoryPolicy("release"),
  }
  return Formatting(**fields | changes)


def test_packing_by_hand():
  sizes = np.array([[6, 2, 1], [5, 1, 1], [4, 2, 2], [5, 1, 3]])
  # A window of one packs in order, one row at a time: 6, then 5 and 4, then 5.
  padding, most = pack(sizes, Regions(10, 4, 8), window=1)
  assert most == 1 and padding == pytest.approx(1 - (9 + 7 + 8 + 9) / (4 * 18))


@pytest.mark.parametrize("layout", [4096, 8192])
def test_the_loader_pads_as_expected(users, layout):
  sizes = measure(users, formatting(), sample=300)
  assert len(sizes) == 300
  found = propose(sizes, layout)
  assert found["context"] + 2 * found["response"] == layout
  regions = Regions(found["context"], found["response"], found["examples"])
  loader = Loader(users, formatting(regions=regions), rows=1, seed=0)
  # The last rows are packed from what the window is left with.
  rows = [batch.rows for batch in loader.batches()][:-8]
  share = np.mean([(row.segments_BL == 0).mean() for row in rows])
  assert share == pytest.approx(found["padding"], abs=0.02)
  assert share < 0.05
  assert not any("refused" in reason for reason in loader.counts)


@pytest.mark.parametrize("condition, pays", [("persona", False), ("none", True)])
def test_a_context_is_shortened_where_that_pays_and_changes_nothing_else(users, condition, pays):
  # Some responses do not fit, and with personas some histories lose items.
  users = users[:100]
  form = formatting(regions=Regions(1400, 160, 4), condition=condition, history=HistoryPolicy())
  loader = Loader(users, form, rows=2)
  fitted = fit_context(loader)
  tokens, given = [], []
  for of in (loader, fitted):
    rows = [batch.rows for batch in of.batches()]
    tokens.append(sum(row.tokens_BL.size for row in rows))
    given.append(
      {int(i): of.tokenised(int(i))[1] for row in rows for i in row.example_BE[row.example_BE >= 0]}
    )
  assert tokens[1] < 0.7 * tokens[0] if pays else fitted is loader
  less = form.regions.context - fitted.formatting.regions.context
  assert less % 128 == 0  # rows divide by the devices that they did divide by
  assert given[0] == given[1] and len(given[0]) < len(users)
  assert loader.counts == fitted.counts
  assert fit_context(loader, least_rows=1000) is loader


def test_what_a_learned_bridge_reads_is_measured_too(users):
  form = formatting(condition="bridge", history=HistoryPolicy())
  sizes = measure(users, form, sample=20)
  assert sizes.shape == (20, 5)
  plain = measure(users, formatting(condition="none", history=HistoryPolicy()), sample=20)
  np.testing.assert_array_equal(sizes[:, :3], plain)
  for (*_, persona, parts), i in zip(sizes, np.linspace(0, len(users) - 1, 20), strict=True):
    example = users[int(i)]
    assert parts == len(render_parts(example.post, example.persona)) and persona > parts


def test_rows_too_short_for_most_are_not_proposed(users):
  assert propose(measure(users, formatting(), sample=50), 256) is None


def test_proposals_are_kept_by_formatting_and_found_again(users, tmp_path):
  form = formatting()
  table = write_proposals(tmp_path, {"train": users}, form, layouts=(4096, 64), sample=100)
  assert "too short for most records" in table
  regions = proposed_regions(tmp_path, form, "4096")
  assert regions.layout == 4096 and regions.examples > 1
  other = proposed_regions(tmp_path, formatting(condition="inferred"), "4096")
  assert other.examples > regions.examples
  with pytest.raises(ValueError, match=r"no regions for rows of 8192 tokens .* \(it has 4096\)"):
    proposed_regions(tmp_path, form, "8192")
  with pytest.raises(ValueError, match=r"\(it has none\)"):
    proposed_regions(tmp_path, formatting(history=HistoryPolicy()), "4096")
