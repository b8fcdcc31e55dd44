"""`python -m jaxrel.cli`."""

import sys

from jaxrel.cli import main

if __name__ == "__main__":
    sys.exit(main())
