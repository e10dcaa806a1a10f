"""Which imports of a script are made before workers are forked."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from everstep.agents.node.imports import Import, chosen, found_in, script_of


@pytest.fixture
def script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """In a folder with two modules of its own; the packages `far`, `near` and `quick` are installed."""
    installed = tmp_path / "site-packages"
    for name in ("far", "near", "quick"):
        (installed / name).mkdir(parents=True)
        (installed / name / "__init__.py").write_text("raise AssertionError('this test imports nothing')")
    (installed / "spread" / "core").mkdir(parents=True)  # a namespace package, as megatron-core is
    elsewhere = tmp_path / "mine"  # on the path, and not installed
    (elsewhere / "loose" / "core").mkdir(parents=True)
    (elsewhere / "unfinished.py").touch()
    monkeypatch.setattr(sys, "path", [*sys.path, str(installed), str(elsewhere)])
    folder = tmp_path / "project"
    (folder / "parts").mkdir(parents=True)
    (folder / "parts" / "__init__.py").touch()
    (folder / "parts" / "models.py").write_text("from near.layers import Block\nimport project_missing")
    (folder / "quick.py").write_text("import far.deep")
    return folder / "train.py"


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("import far, near", [("far", ()), ("near", ())]),
        ("from far import a, b\nfrom far import b, c", [("far", ("a", "b", "c"))]),
        ("from far.deep import *", [("far.deep", ())]),
        (
            '"""What it is."""\nfrom __future__ import annotations\nimport math, torch, everstep, torch.nn\nimport far',
            ["far"],
        ),
        ("import unfinished, missing\nimport far", ["far"]),  # where a user still works, or nowhere
        ("from spread.core import a\nfrom loose.core import b", [("spread.core", ("a",))]),
        ("try:\n    import far\nexcept ImportError:\n    import near", ["far"]),
        ("import quick", ["far.deep"]),  # the script's folder comes first
        ("from parts import models", [("near.layers", ("Block",))]),
        ("from parts.models import Net\nimport quick", [("near.layers", ("Block",)), "far.deep"]),
        ("def f():\n    import os\n    os.environ['A'] = '1'\n    import near\nimport far", ["far"]),
        ("import warnings\nwarnings.simplefilter('ignore')\nHOME = '/'\nimport far", ["far"]),
        ("import os\nprint(os.environ['HOME'], os.environ.get('A'))\nimport far", ["far"]),
        ("import near, os\nos.environ['A'] = '1'\nimport far", ["near"]),
        ("from os import environ\nif True:\n    environ.setdefault('A', '1')\nimport far", []),
        ("import os\ndel os.environ['A']\nimport far", []),
        ("import sys\nsys.path.insert(0, '..')\nimport far", []),
        ("import sys\nsys.path += ['..']\nimport far", []),
        ("import near\nthis is no Python", []),
        ("import near\nif __name__ == '__main__':\n    import far", ["near"]),
    ],
)
def test_what_is_found(script: Path, text: str, found: list[str | tuple[str, tuple[str, ...]]]) -> None:
    script.write_text(text)
    assert found_in(script) == [Import(*((item, ()) if isinstance(item, str) else item)) for item in found]


def test_modules_that_import_each_other(script: Path) -> None:
    (script.parent / "quick.py").write_text("import train\nimport far")
    script.write_text("import quick\nimport near")
    assert [item.module for item in found_in(script)] == ["far", "near"]


def test_what_the_flag_means(script: Path) -> None:
    script.write_text("import far")
    far, near = Import("far"), Import("near", asked=True)
    assert chosen("auto", script) == [far]
    assert chosen("near", script) == [near]
    assert chosen("auto, near", script) == [far, near]
    assert chosen("none", script) == chosen("", script) == chosen("auto", None) == []


def test_where_the_script_is(script: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(script.parent)
    script.touch()
    assert script_of("train.py", module=False) == Path("train.py")
    assert script_of("parts.models", module=True) == script.parent / "parts" / "models.py"
    assert script_of("parts", module=False) is None, "a folder's program is not read"
    assert script_of("nowhere", module=True) is None
