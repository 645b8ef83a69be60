"""`python -m fast.cli`, for an installation whose scripts are not on the PATH."""

import sys

from fast.cli import main

sys.exit(main())
