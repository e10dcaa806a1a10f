"""Mistakes in a rule file: each error names the file, the rule and the intention."""

from __future__ import annotations

from pathlib import Path

import pytest

from everstep.checkpointing.convert.core.content import ConversionError
from everstep.checkpointing.convert.rules.patterns import Table
from everstep.checkpointing.convert.rules.rulefile import built_in, read_rules
from everstep.checkpointing.convert.rules.sharding import (
    Expert,
    Flat,
    Fused,
    Replicated,
    Vocabulary,
    along,
)

GOOD = """
[[shard]]
pattern = ["{x*}.norm.weight", "{x*}.norm.bias"]
how = "replicated"

[[shard]]
regex = '.*\\.(gate|up)$'
how = "fused"
widths = [[2, 3], [1, 1]]

[[shard]]
pattern = "a.{n}"
how = "dim"
dim = 1

[[shard]]
pattern = "embed"
how = "vocab"
rows = 50
multiple = 8

[[shard]]
pattern = "experts.{n}"
how = "expert"
placement = [[0, 2], [1]]

[[shard]]
pattern = "flat"
how = "flat"
shape = [2, 3]
"""


def write(folder: Path, text: str) -> Path:
    path = folder / "mine.toml"
    path.write_text(text)
    return path


def test_a_file_of_all_kinds(tmp_path: Path) -> None:
    rules = read_rules(write(tmp_path, GOOD))
    assert [rule.sharding for rule in rules.shards] == [
        Replicated(),
        Fused(0, widths=((2, 3), (1, 1))),
        along(1),
        Vocabulary(50, 8),
        Expert(((0, 2), (1,))),
        Flat((2, 3)),
    ]
    table = Table(rules.shards)
    found = table.resolve(["b.c.norm.weight", "b.gate", "a.3", "embed"])
    assert [match.rule.where for match in found.values()] == [f"mine.toml:shard {n}" for n in (1, 2, 3, 4)]
    assert table.unused(["b.gate", "a.3"]) == [f"mine.toml:shard {n}" for n in (1, 4, 5, 6)]
    assert rules.variables == ()
    assert read_rules(built_in("qwen2")).variables == ("heads", "groups", "head_dim")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[[shard]", r"mine\.toml: not TOML: "),
        ("[[shards]]\nhow='dim'", r"mine\.toml: unknown key 'shards' \(did you mean 'shard'\?\)"),
        ("shard = 3", r"shard is to be a list of tables, each begun with \[\[shard\]\]"),
        (
            "[[shard]]\npatern='a'\nhow='dim'\ndim=0",
            r"shard 1: unknown key 'patern' \(did you mean",
        ),
        ("[[shard]]\npattern='a'\nhow='replicate'", r"shard 1: how = 'replicate' \(did you mean 'replicated'\?\)"),
        ("[[shard]]\npattern='a'", r"shard 1: how = None; expected replicated"),
        ("[[shard]]\npattern='a'\nhow='dim'", r"shard 1: dim = None; expected a number"),
        ("[[shard]]\npattern='a'\nhow='dim'\ndim=-1", r"dim = -1; expected a number that is not negative"),
        ("[[shard]]\npattern='a'\nhow='average'\ndim=1", r"unknown key 'dim'"),
        ("[[shard]]\nhow='average'", r"expected either pattern or regex"),
        ("[[shard]]\nregex='('\nhow='average'", r"regex: '\(' is not a regular expression"),
        ("[[shard]]\npattern='a.{}'\nhow='average'", r"pattern: 'a\.\{\}': '\{\}' is not a placeholder"),
        ("[[shard]]\npattern='a.{n'\nhow='average'", r"a brace that belongs to no placeholder"),
        ("[[shard]]\npattern=[3]\nhow='average'", r"pattern = \[3\]; expected a name or a list of names"),
        ("[[shard]]\npattern='a'\nhow='fused'\nwidths=[1]", r"widths = 1; expected a list of numbers"),
        (
            "[[name]]\na='x.{n}'\nb='y.{m}'",
            r"name 1: 'y\.\{m\}' has the placeholders \['m'\], and '",
        ),
        ("[[name]]\nhow='same'", r"name 1: expected a, b or both"),
        ("[[name]]\na=['x','y']\nb='z'", r"2 names for 1; say how they make each other"),
        ("[[name]]\na='x'\nb='z'\nhow='concat'", r"concat takes several names of a, and one of b"),
        ("[[name]]\na='x'\nb='z'\nhow='drop'", r"a rule with one side drops"),
        ("[[name]]\na='x'\nb='z'\nhow='trnspose'", r"did you mean 'transpose'"),
        ("[[name]]\na='x'\nb='z'\ndtype='floot32'", r"dtype = 'floot32' \(did you mean 'float32'\?\)"),
        ("[[name]]\na=['x','y']\nb='z'\nhow='qkv'", r"qkv takes the three names"),
    ],
)
def test_a_mistake_is_named(text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ConversionError, match=message) as caught:
        read_rules(write(tmp_path, text))
    assert "\n" not in str(caught.value)
    assert "mine.toml" in str(caught.value)


def test_files_that_are_not_there(tmp_path: Path) -> None:
    with pytest.raises(ConversionError, match=r"none\.toml: cannot be read: No such file"):
        read_rules(tmp_path / "none.toml")
    with pytest.raises(ConversionError, match=r"no rules are named 'lama' \(did you mean 'llama'\?\)"):
        built_in("lama")
