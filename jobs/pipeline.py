"""`zsr pipeline` as a module, for `ray job submit -- python -m jobs.pipeline`."""

import sys

from zsr.cli import main

if __name__ == "__main__":
    sys.exit(main(["pipeline", *sys.argv[1:]]))
