"""`python -m fettle`: the same as the command `fettle`."""

import sys

from fettle.cli.main import entry

if __name__ == "__main__":
    sys.exit(entry())
