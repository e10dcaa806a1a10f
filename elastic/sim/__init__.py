"""A deterministic simulator of a job: the real coordinator and planners under virtual time, with injected faults."""
