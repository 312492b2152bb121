"""``python -m geoexplora``."""

import sys

from geoexplora.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
