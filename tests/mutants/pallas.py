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
        ("kernel * dilation, stride)", "kernel, stride)", f"{GPU} -k reasons"),
        ("< _MIN_CAPABILITY", Operator("Lt_LtE"), f"{GPU} -k capability"),
        ("spec.kernel_spatial) <= 49", Operator("LtE_Lt"), f"{GPU} -k preferred"),
        ("self.multiplier // self.width", "self.multiplier", f"{GPU} -k vectors"),
        (
            "width % m and m % width",
            Operator("ReplaceAndWithOr"),
            f"{GPU} -k vectors",
        ),
        (
            "mask = _inside(row, rows.source) & _inside(col, cols.source)",
            "mask = _inside(col, cols.source)",
            f'{PALLAS} -k "pallas_gpu and forward"',
        ),
        (
            "(row + i < rows.result) & (col + j < cols.result)",
            "row + i < rows.result",
            f"{GPU} -k filter_grad",
        ),
        (
            "jnp.where(met[i, j][:, None], value, 0) if overhang else value",
            "value",
            f"{GPU} -k infinity",
        ),
        (
            "(share * problems + problem)",
            "(share + problem)",
            f'{GPU} -k "filter_grad or pixels"',
        ),
        (
            "live = tile < tiles",
            Operator("Lt_LtE"),
            f'{PALLAS} -k "pallas_gpu and filter_grad"',
        ),
        ("* parts > _CHAIN", "* parts > 10**6", f'{PALLAS} -k "pallas_gpu and forward"'),
        ('"ignore", "The Pallas', '"error", "The Pallas', f"{GPU} -k lowered"),
        (
            "mask = (row < rows.result) & (col < cols.result)",
            "mask = row < rows.result",
            f'{PALLAS} -k "pallas_gpu and input_grad"',
        ),
        ("taps[trips * most :]", "taps[most:]", f"{GPU} -k loops"),
        (
            "value.reshape(slots, abreast, vectors.width).sum(0)",
            "value.reshape(slots, abreast, vectors.width)[0]",
            f'{PALLAS} -k "pallas_gpu and filter_grad"',
        ),
    ),
    *faults(
        "_impl/pallas_tpu.py",
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
        (
            "spec.multiplier > 1 or batch < _SUBLANES:",
            Operator("ReplaceOrWithAnd"),
            f"{TPU} -k preferred",
        ),
        (
            "or batch < _SUBLANES:\n        return True",
            Operator("Lt_LtE"),
            f"{TPU} {IMPLEMENTATIONS} -k 'preferred or defaults'",
        ),
        (
            "min(spec.kernel_spatial) > 3",
            Operator("Gt_GtE"),
            f"{TPU} -k preferred",
        ),
        (
            "(row >= 0) & (row < self.source)",
            "row < self.source",
            f'{TPU} -k "tiles and forward"',
        ),
        (
            "        zero(r, filled, stop - filled)\n",
            "",
            f'{PALLAS} -k "pallas_tpu and forward"',
        ),
        (
            "n * block + image < plan.batch",
            Operator("Lt_LtE"),
            f'{TPU} -k "views and filter_grad"',
        ),
        ("if not rows.exist(row)", "if False", f"{TPU} -k infinities"),
        (
            "(ids[2] == 0) & (ids[3] == 0) &",
            "(ids[2] == 0) &",
            f'{TPU} -k "tiles and filter_grad"',
        ),
        (
            '"arbitrary" if plan.op == "filter_grad" else "parallel"',
            '"parallel"',
            f'{TPU} -k "lowers and filter_grad"',
        ),
        (
            "jax.enable_x64(False)",
            Operator("ReplaceFalseWithTrue"),
            f'{TPU} -k "lowers and forward"',
        ),
        (
            "lane * multiplier + m, jnp",
            "lane * multiplier, jnp",
            f'{PALLAS} -k "pallas_tpu and input_grad"',
        ),
        (
            "lanes + m >= i * _LANES",
            Operator("GtE_Gt"),
            f'{TPU} -k "registers and input_grad"',
        ),
        (
            "return 2 * blocks + scratch",
            "return blocks + scratch",
            f'{TPU} -k "resort or vmem or there"',
        ),
        (
            "plans[0].columns.tiles > 1 and limit != _VMEM[-1]",
            "False",
            f'{TPU} -k "resort or vmem or there"',
        ),
        (
            "min(fitting, key=lambda plan: plan.rows.moved)",
            "fitting[0]",
            f'{TPU} -k "resort or vmem or there"',
        ),
        ("batch >= 64", Operator("GtE_Gt"), f"{TPU} -k layout"),
        (
            "offset - last[-1] <= step * width",
            "offset - last[-1] <= step * width + 1",
            f"{TPU} -k runs",
        ),
        (
            "jnp.sum(products, 0)",
            "products[0]",
            f'{TPU} -k "place and filter_grad"',
        ),
        (
            "(before, middle, after)",
            "(after, middle, before)",
            f'{TPU} -k "place and forward"',
        ),
    ),
]
