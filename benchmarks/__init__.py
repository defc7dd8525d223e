"""Timings, never tests: each program prints a table and can write JSON. `python -m benchmarks.NAME --help`."""
