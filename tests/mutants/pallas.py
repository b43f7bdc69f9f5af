"""Faults of the Pallas kernels."""

from mutants.arguments import IMPLEMENTATIONS
from mutants.fault import Operator, faults

GPU = "tests/test_pallas_gpu.py"
TPU = "tests/test_pallas_tpu.py"
PALLAS = "tests/test_pallas.py"

FAULTS = [
    *faults(
        "_impl/pallas_gpu.py",
        (">= _MAX_ELEMENTS", Operator("GtE_Gt"), f"{GPU} -k reasons"),
        ("< _MIN_CAPABILITY", Operator("Lt_LtE"), f"{GPU} -k capability"),
        ("self.multiplier // self.width", "self.multiplier", f"{GPU} -k vectors"),
        (
            "mask = _inside(row, rows.source) & _inside(col, cols.source)",
            "mask = _inside(col, cols.source)",
            f'{PALLAS} -k "pallas_gpu and forward"',
        ),
        (
            "jnp.where(met[i, j][:, None], value, 0) if overhang else value",
            "value",
            f"{GPU} -k infinity",
        ),
        (
            "live = tile < tiles",
            Operator("Lt_LtE"),
            f'{PALLAS} -k "pallas_gpu and filter_grad"',
        ),
        (
            '"ignore", "The Pallas',
            '"error", "The Pallas',
            f"{GPU} -k lowered",
            "only of newer versions JAX warns, where it is seen",
        ),
        ("taps[trips * most :]", "taps[most:]", f"{GPU} -k loops"),
    ),
    *faults(
        "_impl/pallas_tpu/__init__.py",
        (
            "(jnp.float32, jnp.bfloat16):",
            "(jnp.float32, jnp.bfloat16, jnp.float16):",
            f"{TPU} -k unsupported",
        ),
        (
            "spec.kernel_spatial[1] > _MAX_COLUMNS",
            Operator("Gt_GtE"),
            f"{TPU} -k unsupported",
        ),
        ("> _MAX_PHASES", Operator("Gt_GtE"), f"{TPU} -k unsupported"),
        ("spec.multiplier > 1", Operator("NumberReplacer", 1), IMPLEMENTATIONS),
    ),
    *faults(
        "_impl/pallas_tpu/plan.py",
        (
            "key=lambda i: plans(i + 1).bytes <= limit",
            "key=lambda i: plans(i + 1).bytes < limit",
            f"{TPU} -k fewest",
        ),
        (
            "return 2 * blocks + scratch",
            "return blocks + scratch",
            f'{TPU} -k "resort or vmem or there"',
        ),
        (
            "plans(1).columns.tiles > 1 and limit != VMEM[-1]",
            "False",
            f'{TPU} -k "resort or vmem or there"',
        ),
        (
            "min(map(plans, sorted(downs)), key=lambda plan: plan.rows.moved)",
            "plans(fewest + 1)",
            f'{TPU} -k "resort or vmem or there"',
        ),
    ),
    *faults(
        "_impl/pallas_tpu/kernels.py",
        ("if not rows.exist(row)", "if False", f"{TPU} -k infinities"),
        (
            '"arbitrary" if plan.op == FILTER_GRAD else "parallel"',
            '"parallel"',
            f'{TPU} -k "steps and filter_grad"',
        ),
        (
            "lane * multiplier + m, jnp",
            "lane * multiplier, jnp",
            f'{PALLAS} -k "pallas_tpu and input_grad"',
        ),
        (
            "lax.fori_loop(1, multiplier, lambda m, total",
            "lax.fori_loop(0, multiplier, lambda m, total",
            f"{TPU} -k lanes_of_a_channel",
        ),
        (
            "(before, middle, after)",
            "(after, middle, before)",
            f'{TPU} -k "place and forward"',
        ),
    ),
    *faults(
        "_impl/pallas_tpu/sources.py",
        (
            "        zero(r, filled, stop - filled)\n",
            "",
            f'{PALLAS} -k "pallas_tpu and forward"',
        ),
        (
            'lax.gather(flat, at[..., None], along, (1, 1), mode="promise_in_bounds")',
            'jnp.take_along_axis(flat, at, axis=1, mode="promise_in_bounds")',
            f'{TPU} -k "any_width or one_image"',
        ),
        (
            "offset - last[-1] <= step * width",
            "offset - last[-1] <= step * width + 1",
            f"{TPU} -k runs",
        ),
    ),
]
