"""`python -m accel`: the command line without an installed script."""

from accel.cli import main

main()
