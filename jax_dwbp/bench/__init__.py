"""The benchmark: `python -m jax_dwbp.bench --help`."""

from jax_dwbp.bench.command import main as main
