"""`python -m sosvae` is the command `sosvae`."""

import sys

from .cli import main

sys.exit(main())
