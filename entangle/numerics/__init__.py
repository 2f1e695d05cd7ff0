"""Measurement of distributions: tensors and arrays only; no model, no path, no label."""
