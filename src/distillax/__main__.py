"""`python -m distillax`: the command line."""

import sys

from distillax.cli import main

if __name__ == "__main__":
    sys.exit(main())
