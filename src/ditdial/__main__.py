"""``python -m ditdial`` is the command ``ditdial``; `accelerate launch -m` needs it."""

from ditdial.cli.app import main

main()
