"""Faults of the C++ code, and how a library with one of them is built: quickly, for this CPU."""

import subprocess
import sys
from pathlib import Path

import jax

from mutants.arguments import SANITIZERS
from mutants.fault import NotPlanted, faults

_FOLDER = Path("_impl/native")
_NAMES = (
    *("native_cpu.cc", "choice.cc", "kernels.cc", "channel_axis.cc", "channel_ring.cc"),
    *("channel_schedule.cc", "channel_reduction.cc"),
    *("channel_lanes.cc", "channel_sums.cc", "channel_moves.cc"),
    *("row_axis.cc", "row_plan.cc", "row_schedule.cc", "row_reduction.cc"),
    *("row_lanes.cc", "row_sums.cc", "row_moves.cc", "plane_schedule.cc", "plane_lanes.cc"),
)
_HEADERS = (
    *("runtime.h", "vectors.h", "lines.h", "depth_axis.h"),
    *("channel_filter.h", "channel_ring.h", "channel_planes.h"),
)
FILES = tuple(str(_FOLDER / name) for name in (*_NAMES, *_HEADERS))
NATIVE_CPU, CHOICE, _, CHANNEL_AXIS, CHANNEL_RING, *_ = FILES
CHANNEL_SCHEDULE, CHANNEL_REDUCTION, CHANNEL_LANES, CHANNEL_SUMS, CHANNEL_MOVES = FILES[5:10]
ROW_AXIS, ROW_PLAN, ROW_SCHEDULE, ROW_REDUCTION, ROW_LANES, ROW_SUMS, ROW_MOVES = FILES[10:17]
PLANE_SCHEDULE, PLANE_LANES, RUNTIME, VECTORS, LINES, DEPTH_AXIS, *_ = FILES[17:]
CHANNEL_FILTER, CHANNEL_RING_H, CHANNEL_PLANES = FILES[-3:]
# Its names are those of the only kernels, so that nothing chooses among instruction sets.
_COMPILER = (
    *("g++", "-std=gnu++20", "-O0", "-march=native", "-fPIC", "-fvisibility=hidden"),
    *("-DAvx2Kernels=BaselineKernels", "-DAvx512Kernels=BaselineKernels"),
    *("-isystem", jax.ffi.include_dir()),
)


def compile_all(root: Path, directory: Path) -> None:
    """Compiles all files of the checkout `root` to `directory`, without a fault."""
    for name in _NAMES:
        _run("-c", str(root / "jax_dwbp" / _FOLDER / name), "-o", str(directory / f"{name}.o"))
    # Those that the sanitizers take too, which stay where they are.
    sanitizers = [sys.executable, str(root / SANITIZERS), str(directory / "sanitized")]
    subprocess.run(sanitizers, check=True, stdout=subprocess.DEVNULL)


def install(file: str, copy: Path, directory: Path) -> None:
    """Builds the library of the checkout `copy`, where only `file` is not as it was compiled.

    There it is found before the one that is installed.
    """
    objects = {name: str(directory / f"{name}.o") for name in _NAMES}
    for name in _changed(file, copy):
        objects[name] = str(copy / f"{name}.o")
        _run("-c", str(copy / "jax_dwbp" / _FOLDER / name), "-o", objects[name])
    _run("-shared", *objects.values(), "-o", str(copy / "jax_dwbp/_impl/_native_cpu.so"))


def sanitized(file: str, copy: Path, directory: Path) -> str:
    """A folder of what the sanitizers need not compile where only `file` is not as it was."""
    folder = copy / "sanitized"
    folder.mkdir()
    changed = {Path(name).stem for name in _changed(file, copy)}
    for each in (directory / "sanitized").glob("*.o"):
        if each.stem.partition("_")[2] not in changed:
            (folder / each.name).symlink_to(each)
    return str(folder)


def _changed(file: str, copy: Path) -> set[str]:
    """The sources to compile where `file` is not as it was: itself, or those that include it."""
    texts = {path.name: path.read_text() for path in (copy / "jax_dwbp" / _FOLDER).glob("*.*")}
    changed, more = set(), {Path(file).name}
    while more:
        changed |= more
        includes = [f'#include "{name}"' for name in more]
        more = {name for name, text in texts.items() if any(i in text for i in includes)} - changed
    return changed & set(_NAMES)


def _run(*arguments: str) -> None:
    done = subprocess.run([*_COMPILER, *arguments], capture_output=True, text=True)
    if done.returncode:
        errors = [line for line in done.stderr.splitlines() if "error" in line]
        raise NotPlanted("; ".join(errors) or done.stderr[-300:])


LARGE = "tests/test_fuzz.py -k large"
CONVERTED = "tests/test_native_cpu.py -k converted"
PACKED = "tests/test_native_cpu.py -k packed"
FITS = "tests/test_native_cpu.py -k not_fit"
PHASES = "tests/test_native_cpu.py -k each_phase"
LONGER = "tests/test_native_cpu.py -k longer"
HUGE = "tests/test_native_cpu.py -k huge"
CHAINS = "tests/test_native_cpu.py -k chains"
CHANNELS = "tests/test_native_cpu.py -k by_channels"
LIKE = "tests/test_native_cpu.py -k like_terms"
TURNED = "tests/test_native_cpu.py -k planes_by_channels"
PLANES = "tests/test_native_cpu.py -k narrow_planes"
ROWS = "tests/test_native_cpu.py -k by_rows"
DEPTH = "tests/test_native_cpu.py -k depth"
SPANS = "tests/test_native_cpu.py -k memory_is"
ALL = 'tests/test_values.py tests/test_fuzz.py tests/test_native_cpu.py -k "native_cpu or large"'
FORWARD, INPUT_GRAD = (
    f'tests/test_values.py -k "native_cpu and {op}"' for op in ("forward", "input_grad")
)

FAULTS = [
    *faults(
        NATIVE_CPU,
        ("return value >= 1;", "return value >= 0;", FITS),
        ("if (low.size() != axes)", "if (low.size() > axes)", FITS),
        ("if (!shared_filter && f[0] != x[0])", "if (false)", FITS),
        ("y[channels] != f[4] * f[5]", "y[channels] < f[4]", FITS),
        (
            "int64_t* shape : {xs, ys}",
            "int64_t* shape : {xs}",
            "tests/test_batching.py -k native_cpu",
            "how many images there are is asked of x alone",
        ),
        ("std::swap(windows[kDepth], windows[kRows]);", "", DEPTH),
        ("spatial, sizes + 6 - kAxes - behind", "spatial, sizes + 2", DEPTH),
    ),
    *faults(
        DEPTH_AXIS,
        ("stride * t + distance", "t + distance", DEPTH),
        ("(t - distance) % stride > 0", "false", DEPTH),
        ("slice < in ?", "slice <= in ?", DEPTH),
        ("stride == 1 && low == 0 && ", "", DEPTH),
        ("CeilDiv(kernel, period)", "kernel / period", DEPTH),
    ),
    *faults(
        CHANNEL_AXIS,
        (
            "CeilDiv(read_size - read_phase, read_step) - offset",
            "(read_size - read_phase) / read_step - offset",
            CHANNELS,
        ),
        ("tap.begin = -offset;", "tap.begin = 1 - offset;", LARGE),
        (
            "other.offset == tap.offset + 1",
            "other.offset == tap.offset + 2",
            "tests/test_native_cpu.py -k rows_of_whole_lines",
        ),
        ("axis.period += window.Phase(k) < in;", "++axis.period;", PHASES),
        # An overflow: no value changes.
        (
            "return dilation * k - low;",
            "return int32_t(dilation) * int32_t(k) - low;",
            SANITIZERS,
        ),
    ),
    *faults(
        CHANNEL_RING,
        ("1 - tile - start", "1 - start", LONGER),
        (
            "columns.falls ? count - 1 - i : i",
            "i",
            INPUT_GRAD,
            "the sums are of the same, by slower code",
        ),
        (
            "call.sizes.channels >= call.kernels.lanes;",
            "call.sizes.channels > 0;",
            SANITIZERS,
        ),
        ("in_place ? call.kernels.lanes * element : block", "in_place ? line : block", ALL),
    ),
    *faults(
        CHANNEL_RING_H,
        (
            "rows.Element(tap, position) * plan.row_bytes",
            "position * rows.read_step * plan.row_bytes",
            LARGE,
        ),
        ("(i * plan.slots + position % plan.slots)", "(position % plan.slots)", DEPTH),
        ("ring + slot * plan.row_lines", "ring + slot % plan.slots * plan.row_lines", CHANNELS),
    ),
    *faults(
        CHANNEL_SCHEDULE,
        (
            "out_row + rows.write_step < rows.write_size;",
            "out_row + rows.write_step <= rows.write_size;",
            LARGE,
        ),
        ("List(i, tap, t + 1, tap.k)", "List(i, tap, t, tap.k)", LARGE),
        ("scratch.met[i].k * call", "i * call", DEPTH),
        ("place.slice * to.slice", "0", DEPTH),
        ("place.problem * plan.chunks + place.chunk;", "place.problem;", ALL),
        # Two threads that write the same: no value changes.
        (
            "std::min((place.band + 1) * plan.turns / plan.bands * plan.together,",
            "std::min(((place.band + 1) * plan.turns / plan.bands + 1) * plan.together,",
            SANITIZERS,
        ),
    ),
    *faults(
        CHANNEL_REDUCTION,
        (
            "std::exchange(held_slice, slice) != slice",
            "std::exchange(held_slice, slice) < 0",
            CHANNELS,
        ),
        ("call.kernels.element_size == 2 ?", "false ?", ALL),
        ("slice %= call.depth.out;", "", DEPTH),
        ("scratch.met[i].k * call", "i * call", DEPTH),
        ("kReductionRows = 32", "kReductionRows = int64_t{1} << 40", CHAINS),
        ("part += 2 * step", "part += 3 * step", ALL),
        # A read out of bounds: no value changes.
        (
            """.channels = blocks.channels,
                                        .multiplier = plan.multiplier,
                                        .column_step = dy.column""",
            """.channels = blocks.Count() * call.kernels.lanes,
                                        .multiplier = plan.multiplier,
                                        .column_step = dy.column""",
            SANITIZERS,
        ),
    ),
    *faults(
        CHANNEL_MOVES,
        ("      if (p >= spans[i].end) continue;\n", "", LARGE),
        (
            "S* values = to + (l * copy.multiplier + m) * copy.channel_step",
            "S* values = to + (m * lanes + l) * copy.channel_step",
            TURNED,
        ),
        ("memcpy(line, lines + t,", "memcpy(line, lines,", PACKED),
    ),
    *faults(
        CHANNEL_PLANES,
        (
            "places[columns.phases[i]] = i *",
            "places[columns.phases[i]] = 2 * i *",
            TURNED,
        ),
        ("Max(0, columns.stride * columns.first)", "columns.stride * columns.first", TURNED),
        ("to[l] < 0 ? &unused : lines + to[l]", "lines + Max(to[l], 0)", TURNED),
        ("2 * count - half * kCount", "kCount", TURNED),
        ("half * kCount / 2 + l / 2", "l / 2", TURNED),
        ("row_step + t * column_step", "row_step + t", TURNED),
    ),
    *faults(
        CHANNEL_FILTER,
        (
            "taps[i].weight - taps[i - 1].weight == taps[1].weight - taps[0].weight",
            "true",
            ALL,
        ),
    ),
    *faults(
        CHANNEL_LANES,
        ("if (kBorder && !(lines >> l & 1)) continue;", "", LARGE),
        (
            "rows_to(0, 1, Min(end, conv.both_end))",
            "rows_to(0, 1, Min(end, conv.both_begin))",
            LARGE,
        ),
        (
            "<= t + j && t + j < segment.begin[i].end",
            "<= t + j && t + j <= segment.begin[i].end",
            LARGE,
        ),
        ("if (conv.in.column_bytes != F::kStride * conv.in.line_bytes) return false;", "", LARGE),
        ("if (conv.in.row_count != F::kAll) return false;", "", LARGE),
        ("(l - k) / kStride >= kColumns", "(l - k) / kStride > kColumns", LARGE),
        ("tap.begin <= t && t + kColumns <= tap.end", "true", CHANNELS),
        ("adjacent && conv.in.column_bytes == conv.in.line_bytes", "adjacent", LARGE),
        ("reach.end = Min(reach.end, tap->end)", "reach.end = Max(reach.end, tap->end)", LARGE),
        (
            "if (conv.store) {\n          StoreWholeLine",
            "if (true) {\n          StoreWholeLine",
            ALL,
        ),
    ),
    *faults(
        CHANNEL_SUMS,
        ("if (!(lines[s] >> l & 1)) continue;", "", CHANNELS),
        (
            "group.all_end = Min(group.all_end, tap->end)",
            "group.all_end = Max(group.all_end, tap->end)",
            LARGE,
        ),
    ),
    *faults(
        RUNTIME,
        ("row(channels_first ? sizes[5]", "row(channels_first ? sizes[4]", LARGE),
        ("scratch.filter = scratch.tile = -1;", "scratch.tile = -1;", FORWARD),
        ("scratch.filter = scratch.tile = -1;", "scratch.filter = -1;", CHANNELS),
        ("if (loop->failed) std::rethrow_exception(loop->error);", "", SANITIZERS),
        ("if (loop->failed) return;", "", SANITIZERS),
        ('value != std::string_view("0")', "true", HUGE),
    ),
    *faults(
        VECTORS,
        (
            "to.bits = (bits & 0x7fffffff) > 0x7f800000 ? (bits >> 16) | 0x40 : rounded",
            "to.bits = rounded",
            CONVERTED,
            "a NaN of a bfloat16 has no lower bits that would carry",
        ),
        ("magnitude < 0x400 ? subnormal : normal", "normal", CONVERTED),
        ("to.bits = sign | (magnitude >= (143u", "to.bits = sign | (magnitude >= (144u", CONVERTED),
        ("kChain = 7;", "kChain = 700;", CHAINS),
        ("constexpr int kToNearest = 8", "constexpr int kToNearest = 9", CONVERTED),
        ("epi16(0xaaaaaaaa, places", "epi16(0x2aaaaaaa, places", CONVERTED),
    ),
    *faults(
        LINES,
        (
            "count >= kLanes<T>) return LoadLine",
            "count > kLanes<T>) return LoadLine",
            ALL,
            "both do",
        ),
        ("maskz_loadu_epi16(mask, from)", "maskz_loadu_epi16(mask >> 1, from)", ROWS),
    ),
    *faults(
        CHOICE,
        ("if (HasRows(call, is_filter_grad)) consider", "consider", LARGE),
        ("!is_filter_grad && HasNarrowPlanes(call)", "!is_filter_grad", ROWS),
        ("!call.channels_first &&", "", TURNED, "another kernel computes the same"),
    ),
    *faults(
        PLANE_SCHEDULE,
        ("columns.in == columns.out && ", "", PLANES),
        ("call.Sources() > 1", "false", PLANES),
        ("if (!call.depth.IsBatch()) return false;", "", DEPTH),
        (" + slice * call.in.slice", "", DEPTH),
        ("axis->read_step > 1 || ", "", PLANES),
        ("std::clamp<int64_t>(width - right, 0, width)", "width - right", PLANES),
        ("std::clamp<int64_t>(rows.in - down, 0, rows.out)", "rows.out", PLANES),
        (
            "reads.push_back(down * width + right)",
            "reads.push_back(down * rows.in + right)",
            PLANES,
        ),
        ("image * call.in.image + call.InPlane(channel)", "plane * call.in.channel", PLANES),
        ("problem * call.filter.problem + ", "", "tests/test_native_cpu.py -k many_problems"),
        ("tap * call.TapStep()", "tap * call.sizes.channels", PLANES),
    ),
    *faults(
        PLANE_LANES,
        ("conv.masks + line * conv.tap_count", "conv.masks", PLANES),
        ("read + l * kLanes<T>, masks[l]", "read + l * kLanes<T>, masks[0]", PLANES),
        ("conv.values - first, static_cast", "kLanes<T>, static_cast", PLANES),
        ("Min(tap + chain, conv.tap_count)", "conv.tap_count", CHAINS),
    ),
    *faults(
        ROW_PLAN,
        ("axis->in + 64) return false;", "axis->in + 64) continue;", SANITIZERS),
        ("columns.write_step == 1 ? 0 :", "phases == 1 ? 0 :", ROWS),
        ("return plan.lines <= most_lines &&", "return", SPANS),
    ),
    *faults(
        ROW_SCHEDULE,
        ("std::exchange(scratch.held[place.slot], place.Filter())", "place.slot", ROWS),
        (
            "return std::min(plan.filters, channels - block * plan.filters)",
            "return plan.filters",
            ROWS,
        ),
        (".before = begin * period", ".before = 0", ROWS),
        ("(count - end) * row_bytes", "0", ROWS),
        ("CeilDiv(count - row, rows.dilation)", "count / rows.dilation", ROWS),
        ("columns.out - first_column)", "columns.out)", ROWS),
        (" + j * plan_.source_lines * plan_.lanes", "", ROWS),
        ("(rows.Before(i) + (source * slices + k) * rows.kernel)", "rows.Before(i)", ROWS),
        ("value % plan_.repeats", "0", ROWS),
        ("if (is_other) ListPieces();", "", DEPTH),
        ("if (slice < 0) continue;", "", SANITIZERS),
        ("if (slices_[listed_[i].k] >= 0)", "", DEPTH),
        ("if (++slice < plan.call.depth.out) return;", "", DEPTH),
    ),
    *faults(
        ROW_REDUCTION,
        ("if (columns * plan_.period != values_) Fold();", "", ROWS),
        ("band != band_ || tile != tile_", "band != band_", ROWS),
        ("call.out.row * call.rows.out - lanes", "call.out.row * call.rows.out", SANITIZERS),
        ("lines_ + slot * plan_.SumLines();\n    for", "lines_;\n    for", ROWS),
        ("std::max<int64_t>(0, row + region.first)", "row + region.first", SANITIZERS),
        ("call.rows.Before(i) * call.columns.kernel + call.columns.Before(j)", "0", ROWS),
        ("if (slice < 0) continue;", "", DEPTH),
        ("sums += call.sizes.SliceTaps()", "sums += 0", DEPTH),
        ("kFoldLines = 2048", "kFoldLines = int64_t{1} << 40", LIKE),
    ),
    *faults(
        ROW_AXIS,
        ("offset * stride - position, offset", "position - offset * stride, offset", ROWS),
        ("RowRegion{0, begin, end - begin}", "RowRegion{0, begin, span}", ROWS),
        ("start += regions[i].extra", "start += 0", ROWS),
        ("some.first + i * tap_step", "some.first + i", ROWS),
    ),
    *faults(
        ROW_MOVES,
        ("LoadSome(from + whole, to + whole, rest)", "LoadSome(from + whole, to + whole, 1)", ROWS),
        ("if (++value == weights.period) value = 0;", "", SANITIZERS),
        ("from[value * weights.value_step]", "from[value]", ROWS),
        ("{weights.period, 1, weights.value_step, 0}", "{weights.period, 1, 1, 0}", ROWS),
        ("if (span <= 2 * kLanes<T>) {", "{", ROWS),
        ("repeat = first % pixels.repeats", "repeat = 0", ROWS),
        ("place += pixels.value_step", "place += 1", ROWS),
        ("there - kCount)", "kCount)", SANITIZERS),
        (
            "Permute(read, places, read_behind), left, to",
            "Permute(read, places, read_behind), kCount, to",
            SANITIZERS,
        ),
        ("pixel % 2 * kCount + pixel / 2", "pixel % 2 * kCount + pixel", ROWS),
        ("pixel += rows.phases", "pixel += 3", ROWS),
    ),
    *faults(
        ROW_LANES,
        ("conv.columns[s] - conv.columns[s - 1] == TapStep(conv)", "true", ROWS),
        ("Max(0, i - kPieceRows + 1)", "Max(0, i - kPieceRows)", ROWS),
        ("(rows == kPieceRows &&", "(rows >= kPieceRows &&", ROWS),
        ("r % kChainRows > 0) continue;", "true) continue;", CHAINS),
        ("repeat = conv.read_before", "repeat = 0", ROWS),
        ("in_line = conv.line_step / conv.repeats;", "in_line = conv.line_step;", ROWS),
        ("if (o < rows) StoreLine", "StoreLine", SANITIZERS),
        ("rows - l * block.rows_of_line", "rows", SANITIZERS),
        ("for (; groups >> level & 1; ++level) total.Add(pairs[level]);", "", ROWS),
    ),
    *faults(
        ROW_SUMS,
        ("(uint32_t{1} << (values - kept)) - 1", "0xffff", ROWS),
        ("Min(values, fold.period - fold.first)", "values", ROWS),
        ("to[(fold.first + i) % fold.period]", "to[i % fold.period]", ROWS),
        ("/ period + 1) / 2 * period", "/ period) / 2 * period", ROWS),
        ("Min(in_steps(met), rows - 1)", "rows - 1", SANITIZERS),
        ("count : count / corr.row_dilation", "count : count", ROWS),
        ("late <= 0 ? 0 :", "true ? 0 :", SANITIZERS),
        ("chained + corr.lines > kChainLines", "false", CHAINS),
    ),
]
