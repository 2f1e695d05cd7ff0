"""How a model becomes sparse: options, calibration, budgets, masks, checkpoints."""
