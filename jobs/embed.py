"""`zsr embed` as a module, for `ray job submit -- python -m jobs.embed`."""

import sys

from zsr.cli import main

if __name__ == "__main__":
    sys.exit(main(["embed", *sys.argv[1:]]))
