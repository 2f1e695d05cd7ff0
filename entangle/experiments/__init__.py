"""Questions asked of a model, each answered by a table."""
