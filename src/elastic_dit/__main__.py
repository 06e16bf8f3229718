"""``python -m elastic_dit`` is the command ``elastic-dit``; `accelerate launch -m` needs it."""

from elastic_dit.cli import main

main()
