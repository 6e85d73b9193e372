"""`python -m cli`, from a bare checkout."""

from . import main

main()
