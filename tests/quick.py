"""The quick tests: of each function named here, a case of each op, implementation and layout.

`pytest -m quick` runs them, in a minute, to be asked after each edit. They are one of everything:
values, each transformation, errors, kernels, the command line. All that is left is the whole suite.
"""

from collections.abc import Iterable

import pytest

FUNCTIONS = {
    "test_batching.py": (
        "test_each_axis_by_name",
        "test_shared_filter_is_one_call_on_the_folded_batch",
    ),
    "test_conv_general_dilated.py": ("test_depthwise", "test_other_calls_go_to_lax"),
    "test_depthwise.py": ("test_result_and_gradients",),
    "test_derivatives.py": ("test_first_order", "test_forward_mode", "test_empty"),
    "test_errors.py": ("test_refused", "test_accepted", "test_unknown_implementation"),
    "test_export.py": ("test_exported_function_has_gradients",),
    "test_implementations.py": ("test_defaults", "test_a_name_runs_that_one_or_raises"),
    "test_in_place_of_lax.py": ("test_install_and_uninstall",),
    "test_main.py": ("test_generated_picture", "test_files", "test_error"),
    "test_native_cpu.py": ("test_a_filter_for_each_problem_is_one_call",),
    "test_pallas.py": ("test_values", "test_vmap"),
    "test_pallas_gpu.py": ("test_lowered_without_a_gpu",),
    "test_pallas_tpu.py": ("test_it_lowers_for_a_tpu",),
    "test_partition.py": ("test_nothing_is_sent_by_name",),
    "test_quick.py": ("test_functions",),
    "test_sharding.py": ("test_values_and_gradients_by_name",),
    "test_transformations.py": ("test_scan_with_checkpoint",),
    "test_values.py": ("test_small", "test_empty"),
}
# What a function has a case of each of; of all else that it is parametrized with it has one.
AXES = ("op", "implementation", "kernel", "data_format")


def mark(items: Iterable[pytest.Item]) -> None:
    met = set()
    for item in items:
        if not isinstance(item, pytest.Function):
            continue
        file, name = item.path.name, item.originalname
        if name in FUNCTIONS.get(file, ()):
            callspec = getattr(item, "callspec", None)
            parameters = callspec.params if callspec else {}
            case = (file, name, *(parameters.get(axis) for axis in AXES))
            if case not in met:
                met.add(case)
                item.add_marker("quick")
