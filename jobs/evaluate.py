"""`zsr evaluate` as a module, for `ray job submit -- python -m jobs.evaluate`."""

import sys

from zsr.cli import main

if __name__ == "__main__":
    sys.exit(main(["evaluate", *sys.argv[1:]]))
