"""`zsr tune` as a module, for `ray job submit -- python -m jobs.tune`."""

import sys

from zsr.cli import main

if __name__ == "__main__":
    sys.exit(main(["tune", *sys.argv[1:]]))
