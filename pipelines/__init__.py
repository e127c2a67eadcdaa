"""Pipelines: the one loop, its stages, and the recipes that wire teachers, students and evaluation together.

The top floor: imports every other package and is imported by `distill.cli` alone.
"""
