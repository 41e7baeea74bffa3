"""`python -m bnncc` is the `bnncc` command."""

from bnncc.cli import main

main()
