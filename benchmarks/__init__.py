"""Benchmarks: what the toolkit is measured by. Run from a checkout; not part of the wheel."""
