"""`zsr semantics` as a module, for `ray job submit -- python -m jobs.semantics`."""

import sys

from zsr.cli import main

if __name__ == "__main__":
    sys.exit(main(["semantics", *sys.argv[1:]]))
