"""Programs joined by files: artefacts in, artefacts out. `python -m stages.NAME`."""
