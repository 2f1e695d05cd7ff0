"""Pruning of a model: options, calibration, budgets, masks, checkpoints."""
