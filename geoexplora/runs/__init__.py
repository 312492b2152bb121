"""Run folders: checkpoints, metrics, plots, progress."""
