"""Every test here starts real processes, and leaves no process or resource behind, even when it fails."""

from tests.jobs.leftovers import nothing_left

__all__ = ["nothing_left"]
