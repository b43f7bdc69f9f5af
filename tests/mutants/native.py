"""Faults of the C++ code, and how a library with one of them is built: quickly, for this CPU."""

import subprocess
from pathlib import Path

import jax

from mutants.fault import NotPlanted, faults

_FOLDER = Path("_impl/native")
_NAMES = ("native_cpu.cc", "kernels.cc")
FILES = tuple(str(_FOLDER / name) for name in _NAMES)
# Its names are those of the only kernels, so that nothing chooses among instruction sets.
_COMPILER = (
    *("g++", "-std=gnu++17", "-O0", "-march=native", "-fPIC", "-fvisibility=hidden"),
    *("-DAvx2Kernels=BaselineKernels", "-DAvx512Kernels=BaselineKernels"),
    *("-isystem", jax.ffi.include_dir()),
)
_METADATA = "Metadata-Version: 2.1\nName: jax_dwbp\nVersion: 0.1.0\n"


def compile_all(root: Path, directory: Path) -> None:
    """Compiles all files of the checkout `root` to `directory`, without a fault."""
    for name in _NAMES:
        _run("-c", str(root / "jax_dwbp" / _FOLDER / name), "-o", str(directory / f"{name}.o"))


def install(file: str, copy: Path, directory: Path) -> None:
    """Builds the library of the checkout `copy`, where only `file` is not as it was compiled.

    There it is found before the one that is installed, by the metadata of an installed package.
    """
    objects = {name: str(directory / f"{name}.o") for name in _NAMES}
    changed = Path(file).name
    objects[changed] = str(copy / "changed.o")
    _run("-c", str(copy / "jax_dwbp" / file), "-o", objects[changed])
    _run("-shared", *objects.values(), "-o", str(copy / "jax_dwbp/_impl/_native_cpu.so"))
    (copy / "jax_dwbp-0.1.0.dist-info").mkdir()
    (copy / "jax_dwbp-0.1.0.dist-info/METADATA").write_text(_METADATA)


def _run(*arguments: str) -> None:
    done = subprocess.run([*_COMPILER, *arguments], capture_output=True, text=True)
    if done.returncode:
        errors = [line for line in done.stderr.splitlines() if "error" in line]
        raise NotPlanted("; ".join(errors) or done.stderr[-300:])


LARGE = "tests/test_fuzz.py -k large"
SUMS = 'tests/test_fuzz.py tests/test_values.py -k "large or (native_cpu and forward)"'
FINITE = 'tests/test_fuzz.py tests/test_values.py tests/test_errors.py -k "large or finite"'
FORWARD, INPUT_GRAD, FILTER_GRAD = (
    f'tests/test_values.py -k "native_cpu and {op}"'
    for op in ("forward", "input_grad", "filter_grad")
)

FAULTS = [
    *faults(
        FILES[0],
        ("return a / b - (a % b < 0)", "return a / b", FORWARD),
        (
            "CeilDiv(read_size - read_phase, read_step) - offset",
            "(read_size - read_phase) / read_step - offset",
            FORWARD,
        ),
        ("tap.begin = -offset;", "tap.begin = 1 - offset;", LARGE),
        ("tap.begin = -offset;", "tap.begin = -offset - 1;", LARGE),
        ("other.offset == tap.offset + 1", "other.offset == tap.offset + 2", LARGE),
        ("if (phase < in) axis.Add(", "axis.Add(", "tests/test_errors.py -k extreme"),
        ("row(channels_first ? sizes[4]", "row(channels_first ? sizes[3]", LARGE),
        (
            "return loop->done.load() >= count; });",
            "return loop->done.load() >= count - 1; });",
            FORWARD,
        ),
        ("    scratch.filter = -1;\n    const int64_t ran", "    const int64_t ran", FORWARD),
        ("rows.Span() + kernels.rows,", "rows.Span() + 1,", LARGE),
        (
            "    ring.Clear(scratch);\n    const char* const in_image",
            "    if (scratch.held.size() != ring.slots * rows.phases.size()) ring.Clear(scratch);\n"
            "    const char* const in_image",
            FORWARD,
        ),
        (
            "if (image != held_image)",
            "if (held_image < 0)",
            FILTER_GRAD,
        ),
        ("channels >= kernels.lanes &&", "channels > 0 &&", LARGE),
        ("&&\n         kernels.element_size * kernels.lanes == 64", "", LARGE),
        (" && kernel <= kInPlaceTaps", "", SUMS),
        (
            "out_row + rows.write_step < rows.write_size;",
            "out_row + rows.write_step <= rows.write_size;",
            LARGE,
        ),
        ("meet(tap, t, row_taps[tap.next].k)", "meet(tap, t, tap.k)", LARGE),
        ("meet(tap, t + 1, tap.k)", "meet(tap, t, tap.k)", LARGE),
        (
            "problem * chunks + chunk) {\n      scratch.filter = problem * chunks + chunk",
            "problem) {\n      scratch.filter = problem",
            FORWARD,
        ),
        (
            "std::fill_n(sum, count_of_sums, Line{});\n        std::fill_n(total",
            "std::fill_n(total",
            FILTER_GRAD,
        ),
        ("kReductionRows = 32", "kReductionRows = int64_t{1} << 40", FILTER_GRAD),
        (
            "for (int64_t step = 1; step < parts;",
            "for (int64_t step = 1; step < parts / 2;",
            FILTER_GRAD,
        ),
        ("part += 2 * step", "part += step", FILTER_GRAD),
        ("      tap.end = std::clamp(tap.end, tap.begin, count);\n", "", LARGE),
        ("type = Type::kFloat16", "type = Type::kBFloat16", FORWARD),
        (
            "int64_t* shape : {xs, ys}",
            "int64_t* shape : {xs}",
            "tests/test_batching.py -k native_cpu",
        ),
        ("window_strides[i], low[i]", "window_strides[i], low[0]", FORWARD),
        (
            "(t + tap.offset) * rows.read_step + rows.phases[tap.phase];\n    return",
            "(t + tap.offset) * rows.read_step;\n    return",
            LARGE,
        ),
        (
            "const int64_t begin = band * turns / bands * kernels.rows;",
            "const int64_t begin = band * out_rows / bands;",
            LARGE,
        ),
        ("lines += slot * row_lines", "lines += slot % slots * row_lines", FORWARD),
    ),
    *faults(
        FILES[1],
        ("(bits + 0x7fff + ((bits >> 16) & 1)) >> 16", "bits >> 16", FORWARD),
        (
            "(bits & 0x7fffffff) > 0x7f800000 ? (bits >> 16) | 0x40 : rounded",
            "rounded",
            FINITE,
        ),
        ("(magnitude >= 0x7c00 ? 224u : 112u)", "112u", FINITE),
        ("magnitude < 0x400 ? subnormal : normal", "normal", FORWARD),
        ("magnitude < (113u << 23) ? subnormal : normal", "normal", FORWARD),
        ("143u << 23", "144u << 23", FINITE),
        (
            "CopyFixed<From, To, 2>(from + i, to + i), i += 2",
            "CopyFixed<From, To, 2>(from + i, to + i), i += 1",
            LARGE,
        ),
        ("(room + columns.stride - 1) / columns.stride", "room / columns.stride", FORWARD),
        ("b[i + kCount / 2] = a[2 * i + 1]", "b[i + kCount / 2] = a[2 * i]", LARGE),
        ("p < spans[i].begin || p >= spans[i].end", "p >= spans[i].end", FORWARD),
        (
            "(line + span.end, 0, (columns.width - span.end) * sizeof(Line))",
            "(line + span.end, 0, 0)",
            FORWARD,
        ),
        ("if (kBorder && !(run.lines >> l & 1)) continue;", "", LARGE),
        ("if (kBorder && !(meets >> j & 1)) continue;", "", LARGE),
        ("kChain = 7;", "kChain = 700;", FORWARD),
        ("        if (chains >> level & 1) AddSums", "        AddSums", FORWARD),
        (
            "rows_to(0, 1, Min(end, conv.both_end))",
            "rows_to(0, 1, Min(end, conv.both_begin))",
            LARGE,
        ),
        ("tap.begin >= t + kColumns || tap.end <= t;", "tap.begin >= t || tap.end <= t;", LARGE),
        ("<= t + j && t + j < run.begin[i].end", "<= t + j && t + j <= run.begin[i].end", LARGE),
        ("run.begin[i].end < t + kColumns", "run.begin[i].end < t", LARGE),
        (
            "taps[i].weight - taps[i - 1].weight == taps[1].weight - taps[0].weight",
            "true",
            SUMS,
        ),
        ("if (conv.in.column_bytes != F::kStride * conv.in.line_bytes) return false;", "", LARGE),
        ("if (!adjacent || conv.tap_count", "if (conv.tap_count", LARGE),
        ("if (conv.in.row_count != F::kAll) return false;", "", LARGE),
        ("t < Min(group.all_begin, group.end)", "t < group.all_begin", LARGE),
        ("if (!(lines[g] >> l & 1)) continue;", "", LARGE),
        ("F::kStride * (tap.end - 1) + k + 1", "F::kStride * (tap.end - 1) + k", LARGE),
        (
            "group.all_end = Min(group.all_end, tap->end)",
            "group.all_end = Max(group.all_end, tap->end)",
            LARGE,
        ),
        ("step = columns.stride * row.column_step", "step = row.column_step", LARGE),
        (
            "S* values = to + (l * row.multiplier + m) * row.depth_step",
            "S* values = to + (m * lanes + l) * row.depth_step",
            LARGE,
        ),
        ("r < F::kFirst + F::kBoth ? 0 : 1", "0", LARGE),
        ("(l - k) / kStride >= kColumns", "(l - k) / kStride > kColumns", LARGE),
        ("group.meet[t] = 0", "group.meet[t] |= 0", LARGE),
        ("taps < kLongRow ? 2 : 1", "taps < kLongRow ? 2 : 1000", FORWARD),
    ),
]
