"""Studies: arms over a base configuration, run through train.py, compared with a control (docs/ablations.md)."""
