"""Strong-to-weak distillation: the ground floor that every other package stands on.

Holds what all share: the nouns (`distill.types`), the run configuration, the Qwen3 family table, chat rendering,
sampling, the divergences, the run directory and the command line. Imports none of `teachers`, `students`, `pipelines`
and `eval` (`distill.cli`, the door, is the one exception). Importing this package imports nothing else, so that
`distill --help` answers at once.
"""

__version__ = "0.1.0"
