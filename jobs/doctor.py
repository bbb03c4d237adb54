"""`zsr doctor` as a module, for `ray job submit -- python -m jobs.doctor`."""

import sys

from zsr.cli import main

if __name__ == "__main__":
    sys.exit(main(["doctor", *sys.argv[1:]]))
