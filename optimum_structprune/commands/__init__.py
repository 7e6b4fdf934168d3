"""The command line. Each command has a module, which may import all other folders."""
