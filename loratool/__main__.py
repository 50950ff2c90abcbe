"""`python -m loratool` is `loratool`."""

from loratool.cli.main import main

main()
