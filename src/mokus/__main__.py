"""`python -m mokus`: the command line, for launchers such as `accelerate launch -m mokus`."""

from mokus.cli import main

main()
