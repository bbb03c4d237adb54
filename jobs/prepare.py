"""`zsr prepare` as a module, for `ray job submit -- python -m jobs.prepare`."""

import sys

from zsr.cli import main

if __name__ == "__main__":
    sys.exit(main(["prepare", *sys.argv[1:]]))
