"""Write the table of settings in docs/reference.md from `Settings`: `python docs/settings.py` rewrites it.

`tests/unit/test_settings.py` checks that the table is up to date.
"""

from __future__ import annotations

from dataclasses import MISSING
from pathlib import Path

from everstep.elastic.contract.settings import SETTINGS, Setting

PAGE = Path(__file__).parent / "reference.md"
BEGIN, END = "<!-- settings: written by docs/settings.py -->", "<!-- end of settings -->"


def table() -> str:
    """A row for each setting: name, flag, default, meaning."""
    return "\n".join(["| setting | flag | default | meaning |", "|---|---|---|---|", *map(_row, SETTINGS)])


def _row(known: Setting) -> str:
    meaning = f"{known.about.meaning} {known.about.more}".strip()
    return f"| `{known.name}` | `{known.flag}` | {_default(known)} | {meaning} |"


def _default(known: Setting) -> str:
    if known.argument is MISSING:
        return "required"
    if isinstance(known.argument, str):
        quoted = known.argument if known.about.unit == "JSON" else f'"{known.argument}"'
        return f"`{quoted}`" if known.argument else "none"
    return f"{known.argument:g}"


def page(text: str) -> str:
    """The page with its table as it has to be. Raises ValueError where the page has no place for it."""
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"{PAGE.name} has no lines {BEGIN} and {END}")
    return f"{before}{BEGIN}\n{table()}\n{END}{after}"


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text()))
