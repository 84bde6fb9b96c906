"""Prompts, texts and preference pairs: one module a task, and files that a user brings."""
