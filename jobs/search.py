"""`zsr search` as a module, for `ray job submit -- python -m jobs.search`."""

import sys

from zsr.cli import main

if __name__ == "__main__":
    sys.exit(main(["search", *sys.argv[1:]]))
