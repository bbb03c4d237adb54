"""`zsr features` as a module, for `ray job submit -- python -m jobs.features`."""

import sys

from zsr.cli import main

if __name__ == "__main__":
    sys.exit(main(["features", *sys.argv[1:]]))
