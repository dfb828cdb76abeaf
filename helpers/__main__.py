"""`python -m helpers`: the course's command line."""

import sys

from helpers.publishing.commands import main

if __name__ == "__main__":
    sys.exit(main())
