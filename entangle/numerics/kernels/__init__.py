"""What only a processor understands: one file a kernel and processor."""
