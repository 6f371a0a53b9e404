"""`python -m lorakit VERB …`, the same as the command `lorakit`."""

from lorakit.cli.main import main

main()
