"""What was agreed in a step, as text and back: of this version, of earlier ones, and of others that are refused."""

from __future__ import annotations

import json
import math
import tarfile
from dataclasses import fields, replace
from pathlib import Path

import pytest

from everstep.elastic.protocol.codec import Unreadable
from everstep.elastic.protocol.terms import Terms
from tests.terms import agreed

EARLIER = Path(__file__).parents[1] / "data" / "versions" / "5fd5c74" / "checkpoint.tar.xz"
FULL = Terms(
    step=7,
    generation=3,
    loss=0.25,
    norm=1e300,
    scale=0.5,
    skip=True,
    tokens=4096,
    groups={"number": 2, "settings": {"lr": [[2, 0.1]], "betas": [[1, [0.9, 0.99]], [1]]}},
    frozen=("a.weight", "b"),
    clip={"norm": 1.0, "value": None},
    idle=(3, 5),
    registered={"scheduler": {"last_epoch": 8, "by": {"x": [1, None]}}},
    layers={"0": 1.5},
    digest="00ff",
    protected=6,
    every=2,
    save="step-8",
    saved=4,
    ancestors=(("run", 1.5),),
    after={"groups": [], "users": {"counter": {"n": 3}}},
    shown=False,
    script=[{"lr": 0.1}],
    end="good enough",
    advance=8,
)


def test_terms_survive_the_way_as_text() -> None:
    assert Terms.of(FULL.to_text()) == FULL
    assert all(getattr(FULL, field.name) != field.default for field in fields(Terms)), "every field is tried"
    assert Terms.of(agreed(step=3).to_text()) == agreed(step=3)
    assert math.isnan(Terms.of(agreed(loss=math.nan).to_text()).loss or 0)


def test_equal_terms_are_equal_text() -> None:
    """Whatever the order in which a rank came to its mappings: the text is compared between ranks by its digest."""
    other = replace(FULL, clip=dict(reversed(FULL.clip.items())))
    assert other.to_text() == FULL.to_text()


def test_what_an_earlier_version_agreed_on_is_read() -> None:
    with tarfile.open(EARLIER) as archive:
        (name,) = [name for name in archive.getnames() if name.endswith("/manifest.json")]
        manifest = archive.extractfile(name)
        assert manifest is not None
        text = json.load(manifest)["agreement"]
    terms = Terms.of(text)
    assert (terms.step, terms.loss, terms.frozen, terms.clip, terms.idle) == (3, 0.05840387661010027, (), {}, ())
    assert terms.after == {"groups": terms.groups, "users": {}}
    assert {name: value for name, value in json.loads(terms.to_text()).items() if name in json.loads(text)} == (
        json.loads(text)
    )


@pytest.mark.parametrize("name", ["step", "loss", "groups", "registered", "protected"])
def test_a_field_that_is_missing_is_named(name: str) -> None:
    raw = json.loads(FULL.to_text())
    del raw[name]
    with pytest.raises(Unreadable, match=rf"Terms has the fields \[.*'{name}'.*\], and these came: \['advance'"):
        Terms.of(json.dumps(raw))


def test_a_field_that_is_unknown_is_named() -> None:
    raw = {**json.loads(FULL.to_text()), "weather": "fine"}
    with pytest.raises(Unreadable, match=r"and these came: .*'weather'"):
        Terms.of(json.dumps(raw))


@pytest.mark.parametrize(
    ("text", "why"),
    [("", "not JSON"), ("{", "not JSON"), ("[1]", "no JSON object"), ('"a5"', "no JSON object")],
)
def test_other_text_is_refused(text: str, why: str) -> None:
    with pytest.raises(Unreadable, match=why):
        Terms.of(text)


def test_a_value_of_another_type_is_refused() -> None:
    with pytest.raises(Unreadable, match="cannot be read from 'seven'"):
        Terms.of(json.dumps({**json.loads(FULL.to_text()), "step": "seven"}))
