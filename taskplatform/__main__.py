"""`python -m taskplatform`: the command, where it is not on the PATH."""

import sys

from taskplatform.cli import main

sys.exit(main())
