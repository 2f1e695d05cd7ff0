"""The results of commands: names of variables, run folders and JSON files."""
