"""`python -m jaxrel.cli`."""

import sys

from jaxrel.cli import main

sys.exit(main())
