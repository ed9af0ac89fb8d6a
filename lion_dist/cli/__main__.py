"""``python -m lion_dist.cli VERB``: the same as ``lion-dist VERB``, where no script is installed."""

import sys

from lion_dist.cli import main

sys.exit(main())
