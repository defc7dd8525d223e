"""The commands of the command line, one file each; `main(name, arguments)` runs one and may return an exit code."""
