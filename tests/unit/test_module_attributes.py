"""Numbers in modules that a script changes in training: a rank that joins warns of those that it has not touched."""

from __future__ import annotations

from torch import nn

from everstep.elastic.step.attributes import LONGEST, SENT, ModuleAttributes


class Annealed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.dropout = nn.Dropout(0.1)
        self.temperature, self.mode, self.calls = 1.0, "soft", 0
        self.layers = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))


def pair() -> tuple[Annealed, ModuleAttributes, Annealed, ModuleAttributes, list[str]]:
    heard: list[str] = []
    old, new = Annealed(), Annealed()
    return old, ModuleAttributes(old, heard.append), new, ModuleAttributes(new, heard.append), heard


def test_what_is_not_touched_is_named_once() -> None:
    old, of_old, new, of_new, heard = pair()
    assert of_old.changed() == {}
    old.dropout.p, old.mode, old.temperature, old.calls = 0.5, "hard", 0.25, 7
    old.layers[1].eval()
    changed = {"dropout.p": 0.5, "mode": "hard", "temperature": 0.25, "calls": 7, "layers.1.training": False}
    assert of_old.changed() == changed
    of_new.join(of_old.changed())
    new.temperature = 0.125  # set in every step, and at another one now
    new.calls += 1
    of_new.check()
    of_new.check()
    assert len(heard) == 1
    named = "mode is 'soft' here and 'hard' there, dropout.p is 0.1 here and 0.5 there, layers.1.training is True here"
    assert f"which began later: {named} and False there;" in heard[0]


def test_what_is_set_alike_is_not_named() -> None:
    old, of_old, new, of_new, heard = pair()
    for model in (old, new):
        model.dropout.p = 0.5
    of_new.join(of_old.changed())
    of_new.check()
    assert not heard


def test_an_evaluation_is_no_change() -> None:
    old, of_old, _, _, _ = pair()
    old.eval()
    assert of_old.changed() == {}
    old.dropout.p = 0.3
    assert of_old.changed() == {"dropout.p": 0.3}


def test_little_is_sent() -> None:
    model = nn.Sequential(*(nn.Dropout(0.1) for _ in range(2 * SENT)))
    model.name = "short"
    attributes = ModuleAttributes(model, print)
    model.name = "x" * (LONGEST + 1)
    for layer in model:
        layer.p = 0.2
    assert len(attributes.changed()) == SENT
    assert "name" not in attributes.changed()
