"""Train a model from a YAML file: `python train.py configs/debug.yaml [--section.key value ...]`."""

import sys

from flexrattn.launch import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
