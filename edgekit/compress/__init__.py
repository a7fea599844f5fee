"""Passes that make a model smaller or faster, each a file of its own, run in child processes."""
