"""Kernels for one kind of processor: a file for each kernel and processor."""
