"""Mathematics on tensors and arrays: no model, no path, no label."""
