"""Simulated users: what their texts say is what their labels say, and nothing else tells."""

import collections
import dataclasses
import hashlib
import json
import re
from pathlib import Path

import numpy as np
import pytest

from alignx_jax.data.records import COMMENTS, DESCRIPTION, DIRECTIONS, PAIRS, parse_record
from alignx_jax.personas import simulator
from alignx_jax.personas.demographics import NOT_STATED, stated
from alignx_jax.personas.preferences import alignx_space
from alignx_jax.personas.prompts import text_of
from alignx_jax.personas.simulator import (
  LINKED,
  SPLITS,
  SimulatorConfig,
  expressed_directions,
  simulate_document,
  simulate_record,
  simulate_user,
)

WORDING = json.loads(
  Path(simulator.__file__).with_name("simulated_phrases.json").read_text(encoding="utf-8")
)
POLE_OF = {
  phrase: (dimension, float(pole == "positive"))
  for dimension, poles in enumerate(WORDING["phrases"])
  for pole, phrases in poles.items()
  for phrase in phrases
}


def poles_of(text):
  """{dimension: direction} that a text expresses, read back with the wording file."""
  assert text.endswith(".")
  poles = {}
  for sentence in text[:-1].split(". "):
    words = sentence.split(" ")
    # A sentence is one or two words and a phrase.
    phrases = [tail for k in (1, 2) if (tail := " ".join(words[k:])) in POLE_OF]
    assert len(phrases) == 1, sentence
    dimension, direction = POLE_OF[phrases[0]]
    assert poles.setdefault(dimension, direction) == direction
  return poles


def labels_of(item):
  return {i: float(d) for i, d in enumerate(item[DIRECTIONS]) if d != 0.5}


def nonneutral(directions_P):
  return {int(i): directions_P[i] for i in np.flatnonzero(directions_P != 0.5)}


def user_of(index, *, split="train", seed=1):
  """{dimension: direction} of the user of a record."""
  return nonneutral(simulate_user(index, split=split, seed=seed).directions)


@pytest.fixture(scope="module")
def records():
  return [simulate_record(i, split="train", seed=1) for i in range(150)]


def test_every_phrase_has_one_pole():
  phrases = [p for poles in WORDING["phrases"] for texts in poles.values() for p in texts]
  assert len(WORDING["phrases"]) == len(alignx_space())
  assert len(POLE_OF) == len(phrases)


def test_a_record_is_the_same_whatever_was_drawn_before(records):
  for index in (140, 3, 77, 3):
    assert simulate_record(index, split="train", seed=1) == records[index]
  assert simulate_record(3, split="train", seed=2) != records[3]
  assert len({json.dumps(record) for record in records}) == len(records)


def test_the_users_of_a_seed_do_not_change():
  """Trained runs are of them; the digest is of version 0.1.0."""
  records = [simulate_record(i, split=split, seed=42) for split in SPLITS for i in range(20)]
  digest = hashlib.sha256(json.dumps(records).encode()).hexdigest()
  assert digest == "8356fda77810fcaf64b6a0504c0bbd7e1393fe8a20a401963e27ea9d0a437f91"


def test_users_of_some_dimensions_speak_of_no_others():
  among = (3, 7, 20, 41, 60, 88)
  config = SimulatorConfig(dimensions=(2, 4), among=among)
  seen = set()
  for index in range(40):
    record = simulate_record(index, split="train", seed=0, config=config)
    texts = [record["chosen"], record["rejected"], *(c["comment"] for c in record[COMMENTS])]
    seen |= {d for text in texts for d in poles_of(text)}
    seen |= labels_of(record).keys()
  assert seen == set(among)


def test_splits_share_no_user():
  users = [simulate_user(i, split=split, seed=0) for split in SPLITS for i in range(60)]
  assert len({user.directions.tobytes() for user in users}) == len(users)
  assert len({str(user.rng.bit_generator.state) for user in users}) == len(users)


def test_users_may_care_about_some_dimensions_alone():
  users = [
    simulate_user(i, split="train", seed=0, config=SimulatorConfig(among=(3, 5, 20, 80, 88)))
    for i in range(40)
  ]
  assert {int(d) for user in users for d in user.active} == {3, 5, 20, 80, 88}
  everyone = SimulatorConfig(among=tuple(range(len(alignx_space()))))
  for i in range(5):
    same = simulate_user(i, split="train", seed=0, config=everyone)
    assert (same.directions == simulate_user(i, split="train", seed=0).directions).all()


@pytest.mark.parametrize("split", SPLITS)
def test_records_follow_the_schema(split):
  config = SimulatorConfig(comments=(0, 3), pairs=(1, 2))
  numbers = set()
  for index in range(40):
    record = simulate_record(index, split=split, seed=0, config=config)
    example = parse_record(json.loads(json.dumps(record)), alignx_space(), f"{split}:{index}")
    numbers.add((len(example.persona.comments), len(example.persona.pairs)))
    assert example.directions is not None
    assert all(item.directions is not None for item in example.persona.history)
    assert 3 <= len(user_of(index, split=split, seed=0)) <= 5
  assert numbers == {(comments, pairs) for comments in range(4) for pairs in (1, 2)}


def test_chosen_and_rejected_express_opposite_poles_of_the_labelled_dimensions(records):
  noisy = 0
  for index, record in enumerate(records):
    user = user_of(index)
    for pair in [record, *record[PAIRS]]:
      labels = labels_of(pair)
      chosen, rejected = poles_of(pair["chosen"]), poles_of(pair["rejected"])
      assert 2 <= len(labels) <= 3
      assert labels.items() <= user.items()
      assert labels == {d: chosen[d] for d in labels} == {d: 1 - rejected[d] for d in labels}
      assert chosen.keys() == rejected.keys()
      assert user.keys().isdisjoint(chosen.keys() - labels.keys())
      noisy += len(chosen) > len(labels)
  pairs = sum(1 + len(record[PAIRS]) for record in records)
  assert 0.4 < noisy / pairs < 0.6


def test_what_a_text_expresses_is_read_back(records):
  space = alignx_space()
  for record in records:
    for text in (record["chosen"], record["rejected"]):
      expected = np.full(len(space), 0.5)
      for dimension, direction in poles_of(text).items():
        expected[dimension] = direction
      np.testing.assert_array_equal(expressed_directions(text, space), expected)


def test_a_phrase_counts_whole_and_of_two_poles_neither():
  read = lambda text: nonneutral(expressed_directions(text, alignx_space()))
  assert read("First worry ALL\n night!") == read("I worry all night, worry all night") == {2: 1.0}
  assert read("First worry all nights. Sworry all night. Worry all.") == {}
  assert read("First worry all night. Then stay perfectly calm.") == {}
  assert read("") == {}
  # One phrase begins another.
  other = read("share edgy remarks without disclaimers")
  assert len(other) == 1
  assert read("ride the bus or subway").keys() == read("ride the bus").keys()


def test_of_another_space_only_its_own_dimensions_are_read():
  space = alignx_space()
  part = dataclasses.replace(space, dimensions=(space.dimensions[5], space.dimensions[2]))
  np.testing.assert_array_equal(expressed_directions("I worry all night.", part), [0.5, 1])


def test_comments_express_their_labels_and_the_labels_are_the_users(records):
  for index, record in enumerate(records):
    user = user_of(index)
    assert 2 <= len(record[COMMENTS]) <= 3 and 1 <= len(record[PAIRS]) <= 2
    for comment in record[COMMENTS]:
      labels, expressed = labels_of(comment), poles_of(comment["comment"])
      assert 2 <= len(labels) <= 3
      assert labels.items() <= user.items()
      assert labels.items() <= expressed.items()
      assert user.keys().isdisjoint(expressed.keys() - labels.keys())


def test_the_history_tells_most_of_what_the_pair_turns_on(records):
  told = total = 0
  for record in records:
    seen = {d for item in record[COMMENTS] + record[PAIRS] for d in labels_of(item)}
    told += len(labels_of(record).keys() & seen)
    total += len(labels_of(record))
  assert told / total > 0.9


def test_a_description_gives_one_dimension_away_and_it_is_the_users(records):
  for index, record in enumerate(records):
    said = record[DESCRIPTION].removeprefix("Someone of whom friends say: ").removesuffix(".")
    told = nonneutral(alignx_space().parse(said))
    assert len(told) == 1
    assert told.items() <= user_of(index).items()


@pytest.fixture(scope="module")
def bare_pairs():
  config = SimulatorConfig(comments=(0, 0), pairs=(0, 0))
  return [simulate_record(i, split="test", seed=0, config=config) for i in range(2000)]


@pytest.mark.parametrize("length", [len, lambda text: len(text.split())], ids=["letters", "words"])
def test_length_tells_nothing(bare_pairs, length):
  difference = [length(pair["chosen"]) - length(pair["rejected"]) for pair in bare_pairs]
  assert 0.47 < np.mean(np.sign(difference) / 2 + 0.5) < 0.53
  assert np.count_nonzero(difference) > 1000


def test_no_pole_is_liked_by_all(bare_pairs):
  directions = [d for pair in bare_pairs for d in labels_of(pair).values()]
  assert 0.47 < np.mean(directions) < 0.53
  noise = [
    (poles_of(pair["chosen"])[d], poles_of(pair["rejected"])[d])
    for pair in bare_pairs
    for d in poles_of(pair["chosen"]).keys() - labels_of(pair).keys()
  ]
  shares = np.mean([[chosen, rejected, chosen == rejected] for chosen, rejected in noise], axis=0)
  np.testing.assert_allclose(shares, 0.5, atol=0.06)  # about 1000 of them


KINDS = {"author": 80, "described": 60, "devoted": 120, "chat": 8}


def test_base_documents_teach_no_alignment():
  kinds = collections.Counter()
  for index in range(400):
    pieces = simulate_document(index, seed=0)
    text = text_of(pieces)
    assert "Chosen" not in text and "Rejected" not in text
    assert pieces[-1] == ("<|im_end|>", "template")
    if "assistant" in text:
      kinds["chat"] += 1
      prompt, reply = text.split("<|im_start|>assistant\n")
      head, post = prompt.split("Post: ")
      assert head == "<|im_start|>system\nReply to the post.<|im_end|>\n<|im_start|>user\n"
      assert post.removesuffix("<|im_end|>\n") in WORDING["posts"]
      assert poles_of(reply.removesuffix("<|im_end|>"))
      continue
    assert "<|im_start|>" not in text
    head, *comments = text.removesuffix("\n\n<|im_end|>").split("Post: ")
    stated = head.removeprefix("Preferences: ").strip()
    poles = collections.defaultdict(list)
    for comment in comments:
      post, said = comment.strip().split("\nComment: ")
      assert post in WORDING["posts"]
      for dimension, direction in poles_of(said).items():
        poles[dimension].append(direction)
    if not stated:
      kinds["author"] += 1
      continue
    profile_P = alignx_space().parse(stated)
    held = {d: values for d, values in poles.items() if profile_P[d] != 0.5}
    assert held
    assert all(set(values) == {profile_P[d]} for d, values in held.items())
    alone = len(comments) == 1 and len(held) == len(poles) == np.sum(profile_P != 0.5) == 1
    kinds["devoted" if alone else "described"] += 1
  assert kinds.total() == 400
  assert all(kinds[kind] > least for kind, least in KINDS.items())


def test_base_authors_are_no_user_of_another_split():
  # A document is by user `index` of the base split: the other splits have other users.
  base = {simulate_user(i, split="base", seed=0).directions.tobytes() for i in range(200)}
  others = {simulate_user(i, split="test", seed=0).directions.tobytes() for i in range(200)}
  assert base.isdisjoint(others)


@pytest.mark.parametrize("link", [0.0, 1.0])
def test_demographics_are_stated_and_leave_users_who_they_were(link):
  config = SimulatorConfig(demographics=link)
  groups = collections.Counter()
  for index in range(40):
    user = simulate_user(index, split="test", seed=3, config=config)
    plain = simulate_user(index, split="test", seed=3)
    record = simulate_record(index, split="test", seed=3, config=config)
    text = record[DESCRIPTION]
    assert text.startswith(user.introduction) and NOT_STATED not in (
      stated(text, "age"),
      stated(text, "gender"),
    )
    linked = np.zeros(90, bool)
    for attribute, (group, poles) in LINKED.items():
      groups[attribute, stated(text, attribute)] += 1
      for pole in poles:
        dimension, _ = alignx_space().find(pole)
        linked[dimension] = True
        if link:
          assert user.directions[dimension] == (stated(text, attribute) == group)
    np.testing.assert_array_equal(user.directions[~linked], plain.directions[~linked])
    if not link:
      # The introduction apart, byte for byte the record of a user who states none.
      whole = simulate_record(index, split="test", seed=3)
      assert record | {DESCRIPTION: text.removeprefix(user.introduction)} == whole
  assert len(groups) == 5 and min(groups.values()) >= 5


def test_groups_that_a_description_gives_away_are_not_contradicted():
  # "Young" is a pole too: who is told to be young there and aged 70 states no age.
  config = SimulatorConfig(demographics=0.0)
  texts = [simulate_record(i, split="test", seed=0, config=config)[DESCRIPTION] for i in range(300)]
  unknown = [text for text in texts if NOT_STATED in (stated(text, "age"), stated(text, "gender"))]
  assert all(re.search("Young|Older|Female|Male", text) for text in unknown)
  assert len(unknown) < 10
