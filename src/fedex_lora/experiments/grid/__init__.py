"""Grids: many runs from one file, resumed by one command, and the table they make."""
