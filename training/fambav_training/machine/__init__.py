"""The machine that a script runs on: its memory, its name and its software."""
