"""Scores of responses, and what a redistribution asks the reward model for besides: attention rows, prefix scores."""
