"""Experiments: `python -m experiments` lists them."""

import os

# XLA logs two errors for every program that exceeds its card. The verdict says so too,
# in words; set the variable to 0 to see XLA's.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
