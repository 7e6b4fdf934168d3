"""The command line: one module per command. It may import everything, and nothing imports it."""
