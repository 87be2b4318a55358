"""`python -m foldrank` is the command `foldrank`."""

import sys

from foldrank.cli import main

if __name__ == "__main__":
    sys.exit(main())
