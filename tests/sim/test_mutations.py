"""The simulator finds deliberate faults in the state machines, and none where there is none."""

from __future__ import annotations

import pytest

from . import mutations
from .mutations import MUTATIONS, Mutation, hunt, mutated


@pytest.mark.soak
@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.name)
def test_every_mutation_is_found(mutation: Mutation) -> None:
    assert hunt(mutation) is not None, f"no seed of {mutations.SEEDS} finds it"


def test_without_a_mutation_nothing_is_found() -> None:
    """What is run is the package: else a mutation would be found whatever it is."""
    assert hunt(None, seeds=3) is None


def test_a_mutation_that_does_not_fit_the_source_is_an_error() -> None:
    with pytest.raises(ValueError, match="0 times, not once"), mutated(Mutation("", "worker.py", "no such line", "")):
        pass
