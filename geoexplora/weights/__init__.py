"""Weights: reading, converting, reporting, writing."""
