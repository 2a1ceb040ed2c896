"""Several runs: compared, laid out as grids, analysed, reported."""
