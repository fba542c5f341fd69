"""Whole runs, through `train.main` or torchrun."""
