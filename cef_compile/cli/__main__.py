"""``python -m cef_compile.cli``."""

import sys

from cef_compile.cli import main

if __name__ == "__main__":
    sys.exit(main())
