"""Students: the model that is trained, the batches that it is trained on, and how both are spread over devices.

Imports `distill`, never `teachers`, `eval` or `pipelines`.
"""
