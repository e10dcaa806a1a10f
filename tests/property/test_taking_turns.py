"""Which optimizer a step is for, and which batch it uses: against a list that is written out."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from everstep.elastic.step.order import DataOrder
from everstep.elastic.step.taking_turns import TakingTurns

EVERY = st.lists(st.integers(1, 6), min_size=1, max_size=3).map(lambda counts: (*counts, 1))


@given(every=EVERY, batches=st.integers(1, 40))
def test_steps_of_a_run(every: tuple[int, ...], batches: int) -> None:
    turns = TakingTurns(every)
    written = [
        (batch, place) for batch in range(batches) for place in range(sum(batch % count == 0 for count in every))
    ]
    assert [turns.batch_of(step) for step in range(len(written))] == written
    assert turns.steps(batches) == len(written)


@given(every=EVERY, samples=st.integers(8, 60), epochs=st.integers(1, 4))
def test_steps_of_epochs(every: tuple[int, ...], samples: int, epochs: int) -> None:
    """Each epoch begins with a batch in which all are due, and uses its samples as without them."""
    order = DataOrder(samples=samples, global_batch_size=4, micro_batch_size=2, seed=1, by_epoch=True)
    several = DataOrder(
        samples=samples, global_batch_size=4, micro_batch_size=2, seed=1, by_epoch=True, turns=TakingTurns(every)
    )
    written = [
        (batch, tuple(k for k, count in enumerate(every) if batch % order.epoch_steps % count == 0))
        for batch in range(epochs * order.epoch_steps)
    ]
    steps = iter(range(epochs * several.epoch_steps))
    for batch, due in written:
        for place in range(len(due)):
            step = next(steps)
            assert (several.batch_of(step), several.due(step)) == (batch, (due, place))
            assert several.indices(step, 1) == order.indices(batch, 1)
            assert several.epoch_of(step) == order.epoch_of(batch)
    assert next(steps, None) is None
