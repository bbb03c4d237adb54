"""`zsr train` as a module, for `ray job submit -- python -m jobs.train`."""

import sys

from zsr.cli import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
