"""`python -m pcl_fast`: the same as `pcl-fast`."""

import sys

from pcl_fast.cli import main

if __name__ == "__main__":
    sys.exit(main())
