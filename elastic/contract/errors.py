"""Errors a training script can cause. Their message is all that a user needs; no traceback of ours goes with them."""

from __future__ import annotations


class UsageError(Exception):
    """A mistake in the script or its settings; the text names what, where, the expected and the actual value."""


class JobEnded(BaseException):
    """The coordinator ended the job while this worker was in it. Unwinds user code; not an error by itself."""


ERROR_CHARACTERS = 64 << 10  # of an error's text that travels to the coordinator, and of its traceback


def shortened(text: str) -> str:
    """A text with its middle left out, if it is too long to be passed on: an exception may name a whole data set."""
    if len(text) <= ERROR_CHARACTERS:
        return text
    half = ERROR_CHARACTERS // 2
    return f"{text[:half]}\n[... {len(text) - 2 * half} characters left out ...]\n{text[-half:]}"
