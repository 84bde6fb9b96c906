"""Termination by parse: parsers, the processes that they run in, and the conditions that read their trees."""
