"""Run the command line: `python -m context_sqla_hosts`."""

import sys

from ._command import main

sys.exit(main())
