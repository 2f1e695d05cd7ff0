"""Measuring neurons: recording, ranking and comparing their distributions, and finding contexts."""
