"""`python -m flexrattn.ablate STUDY.yaml`."""

import sys

from flexrattn.ablate.cli import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
