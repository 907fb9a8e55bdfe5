"""Hostile files for every reader of the project: mutated seeds, checks on what a reader does, and the processes."""
