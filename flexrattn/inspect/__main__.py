"""`python -m flexrattn.inspect`; with `--help` what it takes."""

import sys

if __name__ == "__main__":
    from flexrattn.inspect.command import main

    sys.exit(main())
