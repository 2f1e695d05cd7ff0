"""Results, drawn."""
