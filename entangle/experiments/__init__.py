"""Experiments on a model; each returns a table."""
