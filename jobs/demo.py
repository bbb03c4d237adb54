"""`zsr demo` as a module, for `ray job submit -- python -m jobs.demo`."""

import sys

from zsr.cli import main

if __name__ == "__main__":
    sys.exit(main(["demo", *sys.argv[1:]]))
