"""`python -m apportion` is `apportion`."""

import sys

from apportion.cli import main

if __name__ == "__main__":
    sys.exit(main())
