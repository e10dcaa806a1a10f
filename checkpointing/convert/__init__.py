"""Checkpoints of other frameworks, into the universal form and out of it, without those frameworks."""
