"""The order of a stream: shuffled epochs, even mixtures, numbers that no two draws share."""

import numpy as np
import pytest

from alignx_jax.data.stream import Stream, mixing_rates


def one_source(size, length, seed):
  return Stream([range(size)], length=length, seed=seed)


def test_rates_are_those_of_t5():
  np.testing.assert_allclose(mixing_rates([100, 300], 1.0), [0.25, 0.75])
  np.testing.assert_allclose(mixing_rates([1, 100], 2.0), [1 / 11, 10 / 11])
  np.testing.assert_allclose(mixing_rates([5, 5000], 1e9), [0.5, 0.5], atol=1e-6)
  with pytest.raises(ValueError, match=r"temperature is 0\.0"):
    mixing_rates([1, 2], 0.0)


def test_each_epoch_has_every_example_once_in_its_own_order():
  stream = one_source(50, 150, seed=3)
  epochs = [[stream[i].example for i in range(k * 50, k * 50 + 50)] for k in range(3)]
  assert all(sorted(epoch) == list(range(50)) for epoch in epochs)
  assert epochs[0] != epochs[1] != epochs[2]
  assert [stream[i].epoch for i in range(150)] == [0] * 50 + [1] * 50 + [2] * 50
  assert epochs[0] != [one_source(50, 150, seed=4)[i].example for i in range(50)]


def test_no_seed_keeps_the_order():
  stream = one_source(5, 10, seed=None)
  assert [stream[i].example for i in range(10)] == [*range(5), *range(5)]
  assert [stream[i].slot for i in range(10)] == list(range(10))


RATES = (0.55, 0.3, 0.15)
GROUPS = [np.arange(0, 40), np.arange(40, 47), np.arange(47, 200)]


def mixed(length=500, seed=0, rates=RATES):
  return Stream(GROUPS, length=length, seed=seed, rates=rates)


def sources_of(stream):
  return np.array(
    [next(s for s, g in enumerate(GROUPS) if stream[i].example in g) for i in range(len(stream))]
  )


def test_any_beginning_of_a_mixture_has_its_rates():
  sources = sources_of(mixed())
  for source, rate in enumerate(RATES):
    ahead = np.cumsum(sources == source) - rate * np.arange(1, 501)
    assert np.abs(ahead).max() <= len(RATES)


def test_a_small_source_comes_again_in_another_order_a_large_one_is_not_repeated():
  stream = mixed()
  places = [stream[i] for i in range(500)]
  small = [p for p in places if p.example in GROUPS[1]]
  assert [p.epoch for p in small] == [i // 7 for i in range(len(small))]
  rounds = [tuple(p.example for p in small[k : k + 7]) for k in range(0, 140, 7)]
  assert all(sorted(r) == list(GROUPS[1]) for r in rounds) and len(set(rounds)) > 15
  large = [p.example for p in places if p.example in GROUPS[2]]
  assert len(large) == len(set(large))


def test_slots_are_unique_and_name_their_example():
  for stream in (mixed(), one_source(30, 75, seed=1)):
    places = [stream[i] for i in range(len(stream))]
    slots = [p.slot for p in places]
    assert len(set(slots)) == len(slots) and max(slots) < stream.slots
    assert [stream.example(s) for s in slots] == [p.example for p in places]


def test_a_longer_stream_begins_with_the_shorter():
  short, long = mixed(200), mixed(500)
  same = [(short[i].example, short[i].epoch) for i in range(200)]
  assert same == [(long[i].example, long[i].epoch) for i in range(200)]


def test_a_source_without_a_rate_does_not_come():
  assert set(sources_of(mixed(rates=(0.5, 0.0, 0.5)))) == {0, 2}
  with pytest.raises(ValueError, match="3 sources do not go with"):
    mixed(rates=(0.5, 0.5))
  with pytest.raises(ValueError, match="2 sources do not go with"):
    Stream([range(3), range(0)], length=4, seed=0, rates=(0.5, 0.5))
