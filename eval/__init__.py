"""Evaluation: tasks, graders, the statistics of a comparison and the report.

Imports `distill`, never `teachers`, `students` or `pipelines`. Write `from eval.x import y`: a plain `import eval`
would hide the builtin of that name.
"""
