"""Trainers and the run folder they write."""
