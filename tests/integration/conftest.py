"""Every test here starts real processes, and leaves none, and nothing of theirs, also when it fails."""

from tests.jobs.leftovers import nothing_left

__all__ = ["nothing_left"]
