"""`zsr export` as a module, for `ray job submit -- python -m jobs.export`."""

import sys

from zsr.cli import main

if __name__ == "__main__":
    sys.exit(main(["export", *sys.argv[1:]]))
