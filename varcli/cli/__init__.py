"""The command line: one file a command, which parses, builds a config, calls one core function and prints the result."""
