"""What a step costs beside TRL's; `python -m benchmarks.steps` measures it."""
