"""What pytest is given for the faults: the files of tests that ought to see them."""

# Not for pytest: the program itself.
SANITIZERS = "tests/sanitizers"

ERRORS = "tests/test_errors.py"
IMPLEMENTATIONS = "tests/test_implementations.py"
DERIVATIVES = "tests/test_derivatives.py"
BATCHING = "tests/test_batching.py"
TRANSFORMATIONS = "tests/test_transformations.py"
STAND_IN = "tests/test_conv_general_dilated.py"
FORMS = "tests/test_depthwise.py"
NEIGHBOURS = "tests/test_tensorflow_neighbours.py"
CUSTOM = "tests/test_tf2jax.py -k custom"
IN_PLACE = "tests/test_in_place_of_lax.py"
EXPLICIT = 'tests/test_sharding.py -k "explicit or stand_in"'
MESH = "tests/test_partition.py -k mesh"
CACHE = "tests/test_fresh_process.py -k cache"
INSPECTORS = "tests/test_inspectors.py"
MAIN = "tests/test_main.py"
BENCH_ALL = "tests/test_bench.py"
BENCH = f"{BENCH_ALL} -k 'not peers and not program'"
BENCH_ERRORS = f"{BENCH_ALL} -k 'error or memory or disk'"


def values(implementation: str, op: str) -> str:
    return f'tests/test_values.py -k "{implementation} and {op}"'


def partition(op: str) -> str:
    return f'tests/test_partition.py -k "{op}"'


def rows(op: str) -> str:
    """What divides rows, of all that `partition` runs."""
    cases = ("causal", "strided", "three_to_one", "crop", "alike", "parts_of", "beyond")
    return f'tests/test_partition.py -k "{op} and ({" or ".join(cases)})"'
