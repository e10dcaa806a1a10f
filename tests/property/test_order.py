"""The data order: a bijection in each epoch, every sample once, whatever straddles."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from everstep.elastic.step.order import DataOrder, derive_seed, permuted


@given(st.integers(1, 400), st.integers(0, 2**62), st.integers(0, 50))
def test_every_epoch_is_a_permutation(size: int, seed: int, epoch: int) -> None:
    assert sorted(permuted(i, size, seed, epoch) for i in range(size)) == list(range(size))


@given(st.integers(1, 60), st.integers(1, 6), st.integers(1, 6), st.integers(0, 99))
def test_every_sample_once_an_epoch(samples: int, micro_batches: int, micro_batch_size: int, seed: int) -> None:
    """Batches straddle epochs wherever they may; the run's samples, cut into epochs, are permutations."""
    batch = micro_batches * micro_batch_size
    order = DataOrder(samples=samples, global_batch_size=batch, micro_batch_size=micro_batch_size, seed=seed)
    epochs = 3
    steps = -(-samples * epochs // batch)
    stream = [i for step in range(steps) for m in range(order.micro_batches) for i in order.indices(step, m)]
    for epoch in range(epochs):
        assert sorted(stream[epoch * samples : (epoch + 1) * samples]) == list(range(samples))


@given(
    st.integers(1, 60), st.integers(1, 6), st.integers(1, 6), st.sampled_from(["drop", "pad", "short"]), st.booleans()
)
def test_epochs_that_begin_with_a_batch(
    samples: int, micro_batches: int, micro_batch_size: int, last_batch: str, shuffle: bool
) -> None:
    """Each sample at most once, the last batch full; padded at least once, the first ones again; shorter exactly once.

    The micro-batches of a shorter one are filled in their order.
    """
    batch = micro_batches * micro_batch_size
    order = DataOrder(
        samples=samples,
        global_batch_size=batch,
        micro_batch_size=micro_batch_size,
        seed=3,
        shuffle=shuffle,
        by_epoch=True,
        last_batch=last_batch,
    )
    steps = order.epoch_steps
    for epoch in range(3):
        first = epoch * steps
        stream = [i for s in range(first, first + steps) for m in range(micro_batches) for i in order.indices(s, m)]
        sizes = [len(order.indices(s, m)) for s in range(first, first + steps) for m in range(micro_batches)]
        assert sum(sizes) == sum(order.size(s).samples for s in range(first, first + steps))
        if last_batch == "short":
            assert sorted(stream) == list(range(samples))
            full, rest = divmod(samples, micro_batch_size)
            assert sizes == ([micro_batch_size] * full + [rest] + [0] * len(sizes))[: len(sizes)]
            size = order.size(first + steps - 1)
            last = sizes[-micro_batches:]
            assert size.micro_batches == sum(map(bool, last))
            assert [size.weight(m) for m in range(size.micro_batches)] == [n / last[0] for n in last if n]
            continue
        assert len(stream) == steps * batch
        if last_batch == "pad":
            assert set(stream) == set(range(samples))
            assert len(stream) < samples + batch
            assert stream[samples:] == (stream[:samples] * batch)[: len(stream) - samples]
        else:
            assert len(set(stream)) == len(stream) > samples - batch
        if not shuffle:
            assert stream == [position % samples for position in range(len(stream))]


@given(st.integers(1, 4), st.integers(0, 20), st.integers(0, 99))
def test_the_order_does_not_depend_on_the_micro_batch_size(micro_batch_size: int, step: int, seed: int) -> None:
    whole, cut = (
        DataOrder(samples=37, global_batch_size=12, micro_batch_size=size, seed=seed) for size in (12, micro_batch_size)
    )
    pieces = [i for m in range(cut.micro_batches) for i in cut.indices(step, m)]
    assert pieces == whole.indices(step, 0)


def test_epochs_and_seeds_differ() -> None:
    orders = {tuple(permuted(i, 100, seed, epoch) for i in range(100)) for seed in range(3) for epoch in range(3)}
    assert len(orders) == 9
    assert tuple(range(100)) not in orders


def test_seeds_are_the_same_on_every_machine() -> None:
    assert derive_seed("forward", 0, 1, 2, 3) == derive_seed("forward", 0, 1, 2, 3)
    assert derive_seed("forward", 0, 1, 23) != derive_seed("forward", 0, 12, 3)
    assert derive_seed("order", 0, 0, 0) == 8419563309202049359
