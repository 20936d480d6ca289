"""`python -m mismatch`, and `torchrun -m mismatch`: the command line."""

import sys

from mismatch.cli import main

if __name__ == "__main__":
    sys.exit(main())
