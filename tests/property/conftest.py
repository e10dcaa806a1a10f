"""The same examples on every run, however slow the machine."""

from __future__ import annotations

from hypothesis import settings

settings.register_profile("everstep", deadline=None, derandomize=True, print_blob=True)
settings.load_profile("everstep")
