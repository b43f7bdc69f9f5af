"""Runs the benchmark's command line."""

import sys

from jax_dwbp.bench.command import main

if __name__ == "__main__":
    sys.exit(main(sys.argv))
