"""Teachers: who judges, and who speaks in the off-policy stage.

A teacher in this process, a vLLM server that the toolkit starts or somebody else hosts, the client that talks to it,
and the store of responses that it wrote once. Imports `distill`, never `students`, `eval` or `pipelines`.
"""
