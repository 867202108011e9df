"""Orchestration: Prefect, DVC, the command `prefopt`. No machine learning."""
