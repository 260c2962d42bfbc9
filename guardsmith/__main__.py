"""`python -m guardsmith` and `accelerate launch -m guardsmith`."""

import sys

from guardsmith.cli.app import main

if __name__ == "__main__":
    sys.exit(main())
