"""`zsr index` as a module, for `ray job submit -- python -m jobs.index`."""

import sys

from zsr.cli import main

if __name__ == "__main__":
    sys.exit(main(["index", *sys.argv[1:]]))
