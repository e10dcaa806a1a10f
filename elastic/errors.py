"""Errors a training script can cause. Their message is all that a user needs; no traceback of ours goes with them."""

from __future__ import annotations


class UsageError(Exception):
    """The script or its settings ask for something that cannot be: says what, where, expected and got."""


class JobEnded(BaseException):
    """The coordinator ended the job while this worker was in it. Unwinds user code; never an error of its own."""
