"""Compare runs over seeds: curves, intervals, parity with a baseline, and a report that says what it does not know."""
