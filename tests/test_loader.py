"""Examples to packed rows: all of them, each once, whole, and in an order one can resume."""

import collections
import dataclasses
import itertools

import jax
import numpy as np
import pytest

from alignx_jax.data.formatting import (
  Formatting,
  Refused,
  condition_of,
  infer_profile,
  tokenise,
)
from alignx_jax.data.loader import Batch, Loader, choose
from alignx_jax.data.records import Example, parse_record
from alignx_jax.data.rows import Regions
from alignx_jax.data.tokenizers import load_tokenizer
from alignx_jax.personas.persona import ComparedPair, HistoryPolicy, Persona, UserComment
from alignx_jax.personas.preferences import alignx_space
from alignx_jax.personas.prompts import render_prompt, render_response, text_of
from alignx_jax.personas.simulator import SimulatorConfig, simulate_record

SPACE, TOKENIZER = alignx_space(), load_tokenizer("bytes")
CHATML = {"chat": "chatml", "prompt": "default"}
LONG = "I would say so at some length. " * 30


def formatting(*, context=1400, response=256, examples=3, condition="persona", **changes):
  regions = Regions(context, response, examples)
  settings = CHATML | {"condition": condition} | changes
  return Formatting(**({"tokenizer": TOKENIZER} | settings), space=SPACE, regions=regions)


@pytest.fixture(scope="module")
def users():
  config = SimulatorConfig(expressed=(1, 2), comments=(1, 3), pairs=(0, 1))
  records = [simulate_record(i, split="test", seed=0, config=config) for i in range(25)]
  return [parse_record(record, SPACE, f"users:{i}") for i, record in enumerate(records)]


def batches_of(examples, form=None, **settings):
  return rows_of(Loader(examples, form or formatting(), **({"rows": 2} | settings)))


def rows_of(loader, lanes_BW=None):
  return [batch.rows for batch in loader.batches(lanes_BW)]


def order_of(batches):
  return [int(i) for batch in batches for i in batch.example_BE.ravel() if i >= 0]


def unpacked(batch):
  """{stream index: (context, [chosen, rejected])} of tokens, positions and targets.

  Read by the layout alone: context region, chosen region, rejected region.
  """
  response = batch.targets_BNR.shape[-1]
  context = batch.tokens_BL.shape[1] - 2 * response
  found = {}
  for b, indices in enumerate(batch.example_BE):
    for e, index in enumerate(indices):
      mine = batch.segments_BL[b] == e + 1
      if index < 0:
        assert not mine.any()
        continue
      in_context = mine & (np.arange(len(mine)) < context)
      parts = []
      for n in range(2):
        start = context + n * response
        there = mine[start : start + response]
        parts.append(
          (
            batch.tokens_BL[b, start : start + response][there],
            batch.positions_BL[b, start : start + response][there],
            batch.targets_BNR[b, n][there],
          )
        )
      assert index not in found
      shown = batch.tokens_BL[b][in_context], batch.positions_BL[b][in_context]
      found[int(index)] = (shown, parts)
  return found


def context_texts(batches):
  """{stream index: text of the context}."""
  return {
    index: TOKENIZER.decode([*tokens, parts[0][0][0]])
    for batch in batches
    for index, ((tokens, _), parts) in unpacked(batch).items()
  }


def assert_same(batches, others):
  assert len(batches) == len(others)
  for batch, other in zip(batches, others, strict=True):
    for name, x, y in zip(batch._fields, batch, other, strict=True):
      np.testing.assert_array_equal(x, y, err_msg=name)


@pytest.mark.parametrize("seed", [None, 0, 5])
@pytest.mark.parametrize("rows", [1, 2, 7])
def test_every_example_appears_once_an_epoch(users, seed, rows):
  batches = batches_of(users, rows=rows, epochs=2, seed=seed)
  assert sorted(order_of(batches)) == list(range(2 * len(users)))
  assert {batch.tokens_BL.shape for batch in batches} == {(rows, 1400 + 2 * 256)}
  assert {batch.example_BE.shape for batch in batches} == {(rows, 3)}


def test_the_ragged_last_batch_is_filled_with_empty_rows(users):
  batches = batches_of(users, formatting(examples=1), rows=7)
  assert sorted(order_of(batches)) == list(range(len(users)))
  empty_B = ~(batches[-1].example_BE >= 0).any(axis=1)
  np.testing.assert_array_equal(empty_B, [False] * 4 + [True] * 3)  # 25 = 3 · 7 + 4
  for name, array in batches[-1]._asdict().items():
    if array is None:  # of a learned bridge, which there is not
      continue
    assert (array[empty_B] == (-1 if name == "example_BE" else 0)).all(), name


def test_empty_slots_have_weight_0_and_example_minus_1(users):
  batches = batches_of(users, rows=2)
  weight = np.concatenate([batch.weight_BE.ravel() for batch in batches])
  example = np.concatenate([batch.example_BE.ravel() for batch in batches])
  np.testing.assert_array_equal(weight, example >= 0)
  assert set(example[weight == 0]) == {-1}
  assert weight.sum() == len(users)


def test_a_row_holds_several_examples_and_no_more_than_its_slots(users):
  short = [dataclasses.replace(user, persona=Persona()) for user in users]
  counts = [(b.example_BE >= 0).sum(axis=1) for b in batches_of(short, formatting(examples=2))]
  assert np.concatenate(counts).max() == 2
  assert np.concatenate(counts).sum() == len(users)


def test_the_stream_is_deterministic(users):
  settings = {"epochs": 2, "seed": 3}
  form = formatting(history=HistoryPolicy("release"))
  assert_same(batches_of(users, form, **settings), batches_of(users, form, **settings))


def test_the_stream_goes_on_exactly_after_any_batch(users):
  loader = Loader(
    users, formatting(history=HistoryPolicy("release")), rows=2, window=4, epochs=2, seed=3
  )
  whole = list(loader.batches())
  assert len(whole) > 8
  counts = dict(loader.counts)
  for done, batch in enumerate(whole, start=1):
    assert_same(rows_of(loader, batch.lanes_BW), [batch.rows for batch in whole[done:]])
  loader.counts.clear()
  assert_same(rows_of(loader, loader.start()), [batch.rows for batch in whole])
  assert loader.counts == counts


@pytest.mark.parametrize("workers", [1, 2, 3])  # of three two are used: they divide 4 rows
def test_workers_do_not_change_the_stream(users, workers):
  # A record that is refused in a worker is counted here.
  users = [*users, dataclasses.replace(users[0], chosen=LONG)]
  alone = Loader(
    users, formatting(history=HistoryPolicy("release")), rows=4, window=4, epochs=2, seed=3
  )
  whole = list(alone.batches())
  shared = dataclasses.replace(alone, workers=workers, counts=collections.Counter())
  assert_same(rows_of(shared), [batch.rows for batch in whole])
  assert shared.counts == alone.counts and sum(alone.counts.values()) >= 2
  assert_same(rows_of(shared, whole[2].lanes_BW), [batch.rows for batch in whole[3:]])


def global_batches(loader, hosts, lanes_BW, count):
  """The next global batches as that many hosts read them, each its own lanes."""
  share = loader.rows // hosts
  parts = []
  for host in range(hosts):
    lanes = lanes_BW[host * share : (host + 1) * share]
    parts.append(list(itertools.islice(loader.batches(lanes, endless=True), count)))
  return [
    Batch(*joined([batch.rows for batch in step], [b.lanes_BW for b in step]))
    for step in zip(*parts, strict=True)
  ]


def joined(rows, lanes):
  whole = jax.tree.map(lambda *arrays: np.concatenate(arrays), *rows)
  return whole, np.concatenate(lanes)


@pytest.mark.parametrize(("hosts", "resumed"), [(1, 4), (2, 1), (4, 2), (2, 4)])
def test_a_stream_saved_by_some_hosts_goes_on_alike_on_others(users, hosts, resumed):
  form = formatting(history=HistoryPolicy("release"))
  loader = Loader(users, form, rows=4, window=4, epochs=40, seed=3)
  whole = list(itertools.islice(loader.batches(), 91))
  assert_same(
    [b.rows for b in global_batches(loader, hosts, loader.start(), 40)],
    [b.rows for b in whole[:40]],
  )
  for step in np.random.default_rng(hosts).choice(np.arange(1, 40), size=2, replace=False):
    saved = global_batches(loader, hosts, whole[step - 1].lanes_BW, 1)[0]
    on = global_batches(loader, resumed, saved.lanes_BW, 50)
    assert_same([b.rows for b in on], [b.rows for b in whole[step + 1 : step + 1 + len(on)]])


def test_hosts_whose_lanes_have_ended_go_on_with_empty_rows(users):
  loader = Loader(users[:5], formatting(), rows=4, window=4)
  one = list(itertools.islice(loader.batches(loader.start()[3:], endless=True), 4))
  assert [bool(b.rows.weight_BE.any()) for b in one] == [True, False, False, False]


def test_a_row_takes_the_oldest_and_what_fills_it_best():
  regions = Regions(context=100, response=20, examples=3)
  # 70 does not fit beside 40; of what does, the larger goes first.
  assert choose([(40, 5, 5), (70, 1, 1), (10, 1, 1), (60, 1, 1)], regions) == [0, 3]
  # A response region can be what is full.
  assert choose([(40, 15, 5), (50, 6, 1), (10, 5, 1)], regions) == [0, 2]
  assert choose([(1, 1, 1)] * 5, regions) == [0, 1, 2]  # no more than its slots
  # Two that fill the row go before one that is larger than either.
  assert choose([(40, 1, 1), (55, 1, 1), (30, 1, 1), (30, 1, 1)], regions) == [0, 2, 3]
  # So does one alone when there is one slot.
  two = Regions(context=100, response=20, examples=2)
  assert choose([(40, 1, 1), (55, 1, 1), (30, 1, 1), (30, 1, 1)], two) == [0, 1]
  with pytest.raises(ValueError, match="longer than the regions"):
    choose([(101, 1, 1)], regions)


def test_seeds_give_other_orders_and_none_keeps_the_order(users):
  # One example a row and a window of one: packing itself changes no order.
  single = {"rows": 1, "window": 1}
  form = formatting(examples=1)
  first, second = (order_of(batches_of(users, form, seed=seed, **single)) for seed in (1, 2))
  assert first != second and list(range(len(users))) not in (first, second)
  in_order = batches_of(users, form, seed=None)
  assert order_of(in_order) == list(range(len(users)))


def test_each_epoch_has_its_own_order_and_history(users):
  form = formatting(history=HistoryPolicy("release"), examples=1)
  batches = batches_of(users, form, seed=1, epochs=2, rows=1, window=1)
  order, n = order_of(batches), len(users)
  assert [i - n for i in order[n:]] != order[:n]
  texts = context_texts(batches)
  # Two draws from 0..4 show the same of a short history in most epochs, not in all.
  differing = sum(texts[i] != texts[n + i] for i in range(n))
  assert n // 5 < differing


def test_an_example_does_not_depend_on_its_neighbours(users):
  form = formatting(history=HistoryPolicy("release"))
  all_texts = context_texts(batches_of(users, form, seed=4))
  few_texts = context_texts(batches_of(users[:9], form, seed=4, rows=1, window=7))
  assert few_texts == {index: all_texts[index] for index in range(9)}


@pytest.mark.parametrize("condition", ["persona", "inferred", "golden", "none"])
def test_packed_tokens_are_the_exact_prompt_and_responses(users, condition):
  batches = batches_of(users, formatting(condition=condition), seed=0)
  packed = {index: parts for batch in batches for index, parts in unpacked(batch).items()}
  assert len(packed) == len(users)
  for index, ((context, positions), branches) in packed.items():
    user = users[index]
    given = {
      "persona": lambda user: {"persona": user.persona},
      "inferred": lambda user: {
        "profile": SPACE.verbalise(SPACE.aggregate([i.directions for i in user.persona.history]))
      },
      "golden": lambda user: {"profile": SPACE.verbalise(user.directions)},
      "none": lambda user: {},
    }[condition](user)
    prompt = text_of(render_prompt(user.post, **CHATML, **given))
    np.testing.assert_array_equal(positions, np.arange(len(context)))
    for (inputs, at, targets), response in zip(branches, (user.chosen, user.rejected), strict=True):
      # Its first input is the context's last token; from there on it predicts itself.
      assert TOKENIZER.decode([*context, inputs[0]]) == prompt
      assert TOKENIZER.decode(targets) == response + "<|im_end|>"
      np.testing.assert_array_equal(inputs[1:], targets[:-1])
      np.testing.assert_array_equal(at, len(context) + np.arange(len(inputs)))


def test_examples_of_a_row_follow_one_another_without_overlap(users):
  # Each region of each row: segments 1, 2, … in blocks, then padding of zeros.
  for batch in batches_of(users):
    response = batch.targets_BNR.shape[-1]
    regions = np.split(batch.segments_BL, [1400, 1400 + response], axis=1)
    for region_BX in regions:
      for segments, count in zip(region_BX, (batch.example_BE >= 0).sum(axis=1), strict=True):
        blocks = [
          int(s) for s, before in zip(segments, [-1, *segments], strict=False) if s != before
        ]
        assert [s for s in blocks if s] == list(range(1, count + 1))
        assert 0 not in blocks[:-1]
    assert (batch.tokens_BL[batch.segments_BL == 0] == 0).all()
    assert (batch.positions_BL[batch.segments_BL == 0] == 0).all()


def make_example(comments=3, pairs=2, **changes):
  persona = Persona(
    tuple(UserComment(f"post {i}?", f"comment {i}. " * 5) for i in range(comments)),
    tuple(ComparedPair(f"pair {i}?", f"better {i}. " * 5, "worse. " * 5) for i in range(pairs)),
    "A gardener.",
  )
  return Example("hand:0", "Tea?", "Yes.", "No.", **({"persona": persona} | changes))


@pytest.mark.parametrize("dropped", range(6))
def test_a_context_too_long_drops_its_oldest_items(dropped):
  example = make_example()
  persona = example.persona
  left = dataclasses.replace(
    persona, comments=persona.comments[dropped:], pairs=persona.pairs[max(0, dropped - 3) :]
  )
  expected = text_of(render_prompt("Tea?", **CHATML, persona=left))
  size = len(TOKENIZER.encode_pieces(render_prompt("Tea?", **CHATML, persona=left)))
  # The last token moves to the responses, so the region may be one shorter.
  (batch,) = batches_of([example], formatting(context=size - 1, response=32))
  assert context_texts([batch]) == {0: expected}
  one_less = batches_of([example], formatting(context=size - 2, response=32))
  if dropped == 5:  # nothing is left to drop
    assert one_less == []
  else:
    (text,) = context_texts(one_less).values()
    assert len(text) < len(expected)
    assert text.endswith("<|im_start|>assistant\n") and "Post: Tea?" in text
    assert text.count("Post: p") == 5 - dropped - 1


@pytest.mark.parametrize(
  ("changes", "reason"),
  [
    ({"chosen": LONG}, "response longer than its region"),
    ({"rejected": LONG}, "response longer than its region"),
    ({"post": LONG}, "context longer than its region"),
    ({"persona": Persona(description=LONG)}, "context longer than its region"),
  ],
)
def test_what_cannot_fit_is_refused_and_counted(users, changes, reason):
  bad = dataclasses.replace(users[3], **changes)
  form = formatting(context=700)
  with pytest.raises(Refused, match=reason):
    tokenise(bad, form, bad.persona)
  loader = Loader([*users[:3], bad, *users[4:8]], form, rows=2, epochs=2, seed=0)
  assert sorted(order_of(rows_of(loader))) == [0, 1, 2, 4, 5, 6, 7, 8, 9, 10, 12, 13, 14, 15]
  assert loader.counts[f"refused, {reason}"] == 2
  assert loader.stream_length == 16


def test_a_response_may_fill_its_region_to_the_last_token():
  example = make_example()
  size = len(TOKENIZER.encode_pieces(render_response(example.chosen, **CHATML)))
  assert order_of(batches_of([example], formatting(response=size))) == [0]
  assert order_of(batches_of([example], formatting(response=size - 1))) == []


def test_examples_that_lost_history_are_counted():
  loader = Loader(
    [make_example(), make_example(0, 0)], formatting(context=300, response=32), rows=1
  )
  shown = context_texts(rows_of(loader))[0]
  assert shown.count("Post: p") < 5
  assert loader.counts == {"too long, oldest history items dropped": 1}


@pytest.mark.parametrize(("prompt", "bos"), [("release_eval", True), ("release_train", False)])
def test_bos_is_added_where_the_format_says(prompt, bos):
  example = make_example()
  context = tokenise(example, formatting(prompt=prompt), example.persona).context
  assert (context[0] == TOKENIZER.bos_id) == bos
  assert context.count(TOKENIZER.bos_id) == bos


def test_a_format_with_bos_needs_a_tokenizer_with_bos():
  with pytest.raises(ValueError, match="bos"):
    formatting(prompt="release_eval", tokenizer=dataclasses.replace(TOKENIZER, bos_id=None))


@pytest.mark.parametrize(("policy", "epochs_scored"), [("all", 1), ("release", 2)])
def test_reference_log_probs_go_with_their_examples(users, policy, epochs_scored):
  size = epochs_scored * len(users)
  reference = np.random.default_rng(0).normal(size=(size, 2)).astype(np.float32)
  form = formatting(history=HistoryPolicy(policy))
  for batch in batches_of(users, form, epochs=2, seed=2, reference=reference):
    for b, e in zip(*np.nonzero(batch.weight_BE), strict=True):
      expected = reference[batch.example_BE[b, e] % size]
      np.testing.assert_array_equal(batch.reference_BNE[b, :, e], expected)


def test_a_mixture_has_its_rates_and_its_own_reference(users):
  groups = [np.arange(0, 3), np.arange(3, len(users))]
  form = formatting(history=HistoryPolicy("release"))
  loader = Loader(users, form, rows=2, epochs=2, seed=2, mixture=(groups, (0.5, 0.5)))
  reference = np.random.default_rng(0).normal(size=(loader.stream.slots, 2)).astype(np.float32)
  loader.reference = reference
  shown = []
  for batch in rows_of(loader):
    for b, e in zip(*np.nonzero(batch.weight_BE), strict=True):
      slot = batch.example_BE[b, e]
      shown.append(loader.stream.example(slot))
      np.testing.assert_array_equal(batch.reference_BNE[b, :, e], reference[slot])
  assert len(shown) == 2 * len(users)
  assert abs(sum(i < 3 for i in shown) - len(users)) <= 1


@pytest.mark.parametrize("condition", ["golden", "inferred"])
def test_a_record_without_labels_is_refused_and_counted(users, condition):
  persona = Persona(comments=(UserComment("p", "c"),))
  unlabelled = dataclasses.replace(users[0], directions=None, persona=persona)
  form = formatting(condition=condition)
  with pytest.raises(Refused, match=f"no {condition} P̃"):
    condition_of(unlabelled, unlabelled.persona, form)
  loader = Loader([*users[1:4], unlabelled], form, rows=2)
  assert sorted(order_of(rows_of(loader))) == [0, 1, 2]
  ((reason, count),) = loader.counts.items()
  assert f"no {condition} P̃" in reason and count == 1


def test_inferred_needs_directions_of_every_item_or_a_profile():
  example = make_example()
  with pytest.raises(Refused, match="neither history directions nor 'profile'"):
    infer_profile(example, example.persona, SPACE)
  known = dataclasses.replace(example, profile="Young")
  assert infer_profile(known, known.persona, SPACE) == "Young"
  # A profile of the whole history is no answer where some items have directions.
  first, *rest = example.persona.comments
  labelled = dataclasses.replace(first, directions=np.full(90, 1.0))
  partly = dataclasses.replace(known.persona, comments=(labelled, *rest))
  with pytest.raises(Refused, match="some history items lack 'Preference Direction'"):
    infer_profile(known, partly, SPACE)


@pytest.mark.parametrize("kind", ["ugc", "pair", "demo"])
def test_kinds_and_order_are_shown_though_nothing_is_drawn(users, kind):
  user = next(u for u in users if len(u.persona.comments) > 1 and u.persona.pairs)
  acts = user.persona
  texts = {
    "ugc": [act.comment for act in acts.comments][::-1],
    "pair": [text for act in acts.pairs[::-1] for text in (act.chosen, act.rejected)],
    "demo": [acts.description],
  }
  form = formatting(history=HistoryPolicy(kinds=(kind,), order="reversed"))
  (shown,) = context_texts(batches_of([user], form, rows=1)).values()
  for other, expected in texts.items():
    places = [shown.find(text) for text in expected]
    if other == kind:
      assert -1 not in places and places == sorted(places)
    else:
      assert set(places) == {-1}


def test_inferred_uses_the_history_that_is_shown(users):
  user = next(user for user in users if len(user.persona.comments) > 1)
  shown = dataclasses.replace(user.persona, comments=user.persona.comments[:1], pairs=())
  # The aggregate of one item is that item.
  assert infer_profile(user, shown, SPACE) == SPACE.verbalise(shown.comments[0].directions)
  assert infer_profile(user, shown, SPACE) != infer_profile(user, user.persona, SPACE)


def test_a_chat_format_the_tokenizer_lacks_is_refused():
  with pytest.raises(ValueError, match=r"no '<\|start_header_id\|>'.*'llama3'.*config.prompt.chat"):
    formatting(chat="llama3")


@pytest.mark.parametrize(
  ("setting", "names"),
  [("condition", "persona, inferred"), ("prompt", "release_train"), ("chat", "chatml")],
)
def test_an_unknown_name_is_refused_with_the_names_there_are(setting, names):
  with pytest.raises(ValueError, match=f"'mine'.*{names}"):
    formatting(**{setting: "mine"})


def test_all_of_a_persona_is_all_of_the_kinds_and_in_the_order_asked_for():
  history = UserComment("a", "first"), UserComment("b", "second")
  persona = Persona(history, (ComparedPair("c", "third", "fourth"),), "a sailor")
  example = Example("x:0", "Tea?", "yes", "no", persona)

  def shown(**fields):
    loader = Loader([example], formatting(history=HistoryPolicy(**fields)), rows=1)
    return loader.tokenised(0)[1]

  def told(persona):
    return tokenise(example, formatting(), persona)

  assert shown() == told(persona)
  assert shown(kinds=("pair",)) == told(Persona(pairs=persona.pairs))
  assert shown(kinds=("demo",)) == told(Persona(description="a sailor"))
  turned = dataclasses.replace(persona, comments=history[::-1])
  assert shown(order="reversed") == told(turned) != told(persona)
