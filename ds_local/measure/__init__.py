"""Measurements of this package beside others, on real processes."""
