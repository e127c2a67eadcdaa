"""``python -m distill.cli``: the console script, where its name is not on the path."""

from distill.cli import main

main()
