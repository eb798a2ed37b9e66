"""``python -m fastkd COMMAND`` and ``torchrun -m fastkd COMMAND``: the command line."""

import sys

from fastkd.cli import main

if __name__ == "__main__":
    sys.exit(main())
