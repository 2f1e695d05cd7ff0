"""Results of commands: names, folders and JSON."""
