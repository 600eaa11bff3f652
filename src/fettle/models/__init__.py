"""Checkpoints, anatomies and families: a model as files, and as methods see it."""
