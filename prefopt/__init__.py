"""Preference objectives and the engine that trains them: mathematics and torch, nothing else."""
