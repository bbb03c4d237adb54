"""`python -m zsr` is the command `zsr`."""

import sys

from zsr.cli import main

if __name__ == "__main__":
    sys.exit(main())
