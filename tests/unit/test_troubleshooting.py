"""docs/troubleshooting.md lists every message that the code shows to a user, and no other one."""

from __future__ import annotations

import re

from everstep.agents.monitoring.story import _WORDS, Grade
from everstep.elastic.contract.notices import Notice
from tests.messages import ROOT, messages

PAGE = ROOT / "docs" / "troubleshooting.md"
ENTRY = re.compile(r"^- `(?P<text>.*)`$")  # of a list under a heading that says cause and remedy


def joined(page: str) -> list[str]:
    """The lines of a page, with an entry that is broken over several lines on one."""
    return re.sub(r"^- `[^`]*`$", lambda entry: entry[0].replace("\n  ", " "), page, flags=re.MULTILINE).splitlines()


def entries() -> dict[str, str]:
    """Each text of the page -> its heading."""
    found: dict[str, str] = {}
    heading = ""
    for line in joined(PAGE.read_text()):
        if line.startswith("#"):
            heading = line.lstrip("# ")
        elif match := ENTRY.match(line):
            assert match["text"] not in found, f"{match['text']!r} stands twice, the second time under {heading!r}"
            found[match["text"]] = heading
    return found


def shown(text: str) -> str:
    """A text as a Markdown code span shows it."""
    return text.replace("`", "'").replace("\n", " ").strip()


def test_every_message_of_the_code_is_listed() -> None:
    listed = entries()
    missing = [f"{m.room}: {m.text}" for m in messages() if shown(m.text) not in listed]
    assert not missing, "docs/troubleshooting.md lacks:\n" + "\n".join(missing)


def test_nothing_is_listed_that_the_code_does_not_say() -> None:
    said = {shown(m.text) for m in messages()} | {str(notice) for notice in Notice} | set(_WORDS)
    stale = [text for text in entries() if text not in said]
    assert not stale, "the code does not say:\n" + "\n".join(stale)


def test_every_warning_and_alarm_is_listed() -> None:
    listed = entries()
    graver = {event for event, (grade, _) in _WORDS.items() if grade > Grade.NEWS and event != "warning"}
    missing = [name for name in (*map(str, Notice), *sorted(graver)) if name not in listed]
    assert not missing, missing


def test_each_list_has_its_cause_and_remedy() -> None:
    text = PAGE.read_text()
    for part in re.split(r"^#+ ", text, flags=re.MULTILINE)[1:]:
        if any(ENTRY.match(line) for line in joined(part)):
            heading = part.splitlines()[0]
            assert "**Cause.** " in part, f"{heading}: no cause"
            assert "**Remedy.** " in part, f"{heading}: no remedy"
