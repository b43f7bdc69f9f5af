"""Executes PTX, what XLA compiles kernels for an NVIDIA GPU to, with NumPy and without a GPU.

    [kernel] = parse(text)
    run(kernel, grid, [address, ...], Memory(inputs, outputs))

Each instruction is executed for all threads of some blocks at once. Threads that diverge take
turns, whoever is furthest behind first, which brings them together again where their paths meet.
There are the instructions that the kernels of this package, and XLA's own around them, are made of:
any other one raises `Unsupported`. An access that is not within a buffer or not aligned, or a store
to an input, raises `BadAccess`.

What it does not see: a missing `bar.sync`, since a warp never runs ahead of another one. And fma is
rounded to float64 before it is to float32, which differs from one rounding for about one out of
2**29 operands, by one unit in the last place.
"""

import dataclasses
import functools
import math
import operator
import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

_WARP = 32
# Registers hold bits, instructions say what they are.
_BITS: dict[str, Any] = {"pred": np.bool_, "b16": np.uint16, "b32": np.uint32, "b64": np.uint64}
_SIGNED: dict[str, Any] = {"s16": np.int16, "s32": np.int32, "s64": np.int64}
_UNSIGNED: dict[str, Any] = {"u16": np.uint16, "u32": np.uint32, "u64": np.uint64}
_INTEGERS = _SIGNED | _UNSIGNED
_HALVES: dict[str, Any] = {"bf16": ml_dtypes.bfloat16, "f16": np.float16}
_TYPES = _BITS | _INTEGERS | _HALVES | {"f32": np.float32}
# Read before it is written: a NaN, and a wild address.
_POISON = 0x7FFFDEAD7FFFDEAD
_THREADS_AT_ONCE = 4096


class Unsupported(Exception):
    """PTX that this module has no code for."""


class BadAccess(Exception):
    """What would be undefined on a GPU."""


class Instruction(NamedTuple):
    text: str
    guard: str  # a predicate's register, or none
    negated: bool
    opcode: str
    operands: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Kernel:
    name: str
    parameters: tuple[str, ...]
    threads: int  # of a block
    registers: dict[str, str]  # the type of each prefix of their names, as {"%rd": "b64"}
    instructions: tuple[Instruction, ...]
    labels: dict[str, int]  # what follows each
    shared: dict[str, int]  # addresses of the arrays in shared memory
    shared_bytes: int  # of those, but for one whose size the launch decides


def parse(text: str) -> list[Kernel]:
    """The kernels of a module."""
    text = re.sub(r"//.*|/\*.*?\*/", "", text)
    arrays = re.findall(r"\.shared\s+\.align\s+(\d+)\s+\.b8\s+([\w$]+)\[(\d*)\]", text)
    entries = re.findall(r"\.entry\s+([\w$]+)\s*\((.*?)\)(.*?)^\{(.*?)^\}", text, re.S | re.M)
    return [_kernel(arrays, *entry) for entry in entries]


def _kernel(
    arrays: list[tuple[str, str, str]], name: str, parameters: str, directives: str, body: str
) -> Kernel:
    threads = re.search(r"\.(?:reqntid|maxntid)\s+(\d+)(?:\s*,\s*1)*\s*$", directives.strip())
    if threads is None:
        raise Unsupported(f"{name}: the shape of its blocks is {directives!r}")
    registers = {name: kind for kind, name in re.findall(r"\.reg\s+\.(\w+)\s+(%[a-z]+)<", body)}
    instructions, labels = [], {}
    for statement, end in re.findall(r"\s*(.+?)\s*(;|:$)", body, re.S | re.M):
        if end == ":":
            labels[statement] = len(instructions)
        elif not statement.startswith("."):
            instructions.append(_instruction(statement))
    names = tuple(re.findall(r"([\w$]+)\s*(?:,|$)", parameters))
    shared, end = {}, 0
    for alignment, symbol, size in sorted(arrays, key=lambda array: array[2] == ""):
        if re.search(rf"\b{re.escape(symbol)}\b", body):
            shared[symbol] = -(-end // int(alignment)) * int(alignment)
            end = shared[symbol] + int(size or 0)
    return Kernel(name, names, int(threads[1]), registers, tuple(instructions), labels, shared, end)


def _instruction(text: str) -> Instruction:
    match = re.fullmatch(r"(?:@(!?)(%\w+)\s+)?([\w.:]+)\s*(.*)", text, re.S)
    if match is None:
        raise Unsupported(text)
    negation, guard, opcode, operands = match.groups()
    # Commas, but for those within braces and brackets.
    split = re.findall(r"(?:[^,{\[]|\{[^}]*\}|\[[^]]*\])+", operands)
    return Instruction(
        " ".join(text.split()), guard or "", bool(negation), opcode, tuple(o.strip() for o in split)
    )


class Memory:
    """Arrays that a kernel may read, and arrays that it may write as well.

    `addresses` has those of the inputs, then of the outputs, which are filled with NaN or, as
    integers, -1. They lie so far apart that no small error leads from one into another.
    """

    _SPACING = 1 << 40

    def __init__(self, inputs: Sequence[np.ndarray], outputs: Sequence[np.ndarray] = ()):
        arrays = [*inputs, *outputs]
        starts = np.cumsum([0, *(-(-array.nbytes // 16) * 16 for array in arrays)])
        self._bytes = np.full(starts[-1], 0xFF, np.uint8)
        self._starts, self._first_output = starts[:-1], len(inputs)
        self._sizes = np.array([array.nbytes for array in arrays])
        self._outputs = outputs
        for start, array in zip(starts, inputs, strict=False):
            data = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
            self._bytes[start : start + data.size] = data
        self.addresses = [(i + 1) * self._SPACING for i in range(len(arrays))]

    def outputs(self) -> list[np.ndarray]:
        """What was stored."""
        spans = zip(self._starts, self._sizes, strict=True)
        found = [self._bytes[start : start + size] for start, size in spans][self._first_output :]
        return [
            data.view(array.dtype).reshape(array.shape)
            for data, array in zip(found, self._outputs, strict=True)
        ]

    def load(self, addresses: np.ndarray, active: np.ndarray, count: int, dtype: Any):
        """`count` consecutive words for each active thread, zero for the others."""
        index = self._index(addresses, active, count, dtype, first=0)
        words = self._bytes.view(dtype)
        return [np.where(active, words[index + i], dtype.type(0)) for i in range(count)]

    def store(self, addresses: np.ndarray, active: np.ndarray, values: Sequence[np.ndarray]):
        dtype = values[0].dtype
        index = self._index(addresses, active, len(values), dtype, first=self._first_output)
        words = self._bytes.view(dtype)
        for i, value in enumerate(values):
            words[index[active] + i] = value[active]

    def _index(self, addresses, active, count: int, dtype: Any, first: int) -> np.ndarray:
        """Of the first word; 0 for the inactive."""
        word = np.dtype(dtype).itemsize
        addresses = np.where(active, addresses, 0).astype(np.int64)
        buffer, offset = np.divmod(addresses, self._SPACING)
        buffer -= 1
        known = (first <= buffer) & (buffer < len(self._sizes))
        buffer = np.where(known, buffer, 0)
        fits = known & (offset + count * word <= self._sizes[buffer])
        fits &= offset % (count * word) == 0
        if not np.all(fits | ~active):
            bad = int(np.argmin(fits | ~active))
            where = f"{offset[bad]} of buffer {addresses[bad] // self._SPACING} by thread {bad}"
            raise BadAccess(
                f"{count * word} bytes at {where}; the buffers have {self._sizes.tolist()}, "
                f"{first} of them are read only"
            )
        return np.where(active, (self._starts[buffer] + offset) // word, 0)


class SharedMemory(Memory):
    """One buffer a block; a thread's addresses are within the one of its own."""

    def __init__(self, size: int, blocks: int, threads: int):
        super().__init__([], [np.empty(size, np.uint8)] * blocks)
        self._base = np.repeat(np.array(self.addresses, np.int64), threads)

    def _index(self, addresses, active, count: int, dtype: Any, first: int) -> np.ndarray:
        # An offset in 32 bits, so a negative one is far beyond the size.
        return super()._index(addresses.astype(np.int64) + self._base, active, count, dtype, first)


def run(
    kernel: Kernel,
    grid: tuple[int, int, int],
    arguments: Sequence[int],
    memory: Memory,
    shared_bytes: int = 0,
    blocks: Sequence[int] | None = None,
) -> np.ndarray:
    """Launches `blocks` of the grid, all by default.

    Returns how many warps executed each instruction, in sum.
    """
    if len(arguments) != len(kernel.parameters):
        raise ValueError(f"{kernel.name} takes {kernel.parameters}, got {arguments}")
    indices = np.arange(math.prod(grid)) if blocks is None else np.asarray(blocks)
    executed = np.zeros(len(kernel.instructions), np.int64)
    at_once = max(1, _THREADS_AT_ONCE // kernel.threads)
    for start in range(0, len(indices), at_once):
        chosen = indices[start : start + at_once]
        executed += _Blocks(kernel, grid, arguments, memory, shared_bytes, chosen).run()
    return executed


class _Blocks:
    """Some blocks while they run, their threads in the order of the blocks."""

    def __init__(self, kernel, grid, arguments, memory: Memory, shared_bytes: int, indices):
        self.kernel, self.memory = kernel, memory
        count = len(indices) * kernel.threads
        size = kernel.shared_bytes + shared_bytes
        self.shared = SharedMemory(size, len(indices), kernel.threads)
        self.arguments = dict(zip(kernel.parameters, arguments, strict=True))
        thread = np.arange(count, dtype=np.uint32) % np.uint32(kernel.threads)
        block = np.repeat(indices, kernel.threads)
        x, y, _ = grid
        zero = np.zeros(count, np.uint32)
        self.special = {
            "%tid.x": thread,
            "%tid.y": zero,
            "%tid.z": zero,
            "%laneid": thread % np.uint32(_WARP),
            "%ctaid.x": (block % x).astype(np.uint32),
            "%ctaid.y": (block // x % y).astype(np.uint32),
            "%ctaid.z": (block // (x * y)).astype(np.uint32),
        }
        self.registers: dict[str, np.ndarray] = {}
        self.at = np.zeros(count, np.int64)  # the instruction where each thread is
        self.executed = np.zeros(len(kernel.instructions), np.int64)

    def run(self) -> np.ndarray:
        end = len(self.kernel.instructions)
        boundaries = sorted({end, *self.kernel.labels.values()})
        while (start := int(self.at.min())) < end:
            active = self.at == start
            warps = int(np.count_nonzero(active.reshape(-1, _WARP).any(1)))
            following = next(b for b in boundaries if b > start)
            for i in range(start, following):
                instruction = self.kernel.instructions[i]
                self.executed[i] += warps
                try:
                    jump = self._step(instruction, active)
                except (Unsupported, BadAccess) as error:
                    error.add_note(f"in {self.kernel.name}: {instruction.text}")
                    raise
                if jump is not None:
                    taken, target = jump
                    self.at[active] = i + 1
                    self.at[taken] = target
                    break
            else:
                self.at[active] = following
        return self.executed

    def _step(self, instruction: Instruction, active: np.ndarray):
        """Executes it, or for a jump returns who takes it, and where to."""
        _, guard, negated, opcode, operands = instruction
        if guard:
            condition = self._read(guard, "pred")
            active = active & (~condition if negated else condition)
        match opcode.split("."):
            case ["bra"] | ["bra", "uni"]:
                return active, self.kernel.labels[operands[0]]
            case ["ret"] | ["exit"]:
                return active, len(self.kernel.instructions)
            case ["bar", "sync"]:
                self._check_barrier(active)
            case ["griddepcontrol", "wait" | "launch_dependents"]:
                pass  # the kernels run one after the other
            case ["ld", "param" | "param::entry", "b64" | "u64"]:
                name = re.fullmatch(r"\[(\w+)\]", operands[1])
                address = self.arguments[name[1]] if name else None
                if address is None:
                    raise Unsupported("a parameter that is not a pointer")
                self._write(operands[0], np.uint64(address), active)
            case ["ld", space, *modifiers]:
                count, dtype = _access(modifiers)
                memory = self._memory(space)
                words = memory.load(self._address(operands[1]), active, count, dtype)
                for register, word in zip(_braced(operands[0]), words, strict=True):
                    # A wider register is filled up with zeros.
                    wide = self.kernel.registers.get(register.rstrip("0123456789")) == "b64"
                    self._write(register, word.astype(np.uint64) if wide else word, active)
            case ["st", space, *modifiers]:
                count, dtype = _access(modifiers)
                values = [self._read(o, f"b{dtype.itemsize * 8}") for o in _braced(operands[1])]
                values = [np.broadcast_to(value, active.shape) for value in values]
                if len(values) != count:
                    raise Unsupported("words that are not as many as those that are stored")
                self._memory(space).store(self._address(operands[0]), active, values)
            case ["shfl", "sync", mode, "b32"]:
                self._write(operands[0], self._shuffle(mode, *operands[1:]), active)
            case [("ldmatrix" | "stmatrix") as name, "sync", "aligned", "m8n8", *rest] if rest in (
                ["x1", "shared", "b16"],
                ["x2", "shared", "b16"],
                ["x4", "shared", "b16"],
            ):
                registers, address = operands if name == "ldmatrix" else operands[::-1]
                self._matrices(name, _braced(registers), self._address(address), active)
            case ["mov", ("b32" | "b64") as kind] if operands[0].startswith("{"):
                whole = np.broadcast_to(self._read(operands[1], kind), active.shape)
                parts = _braced(operands[0])
                half = whole.view(_BITS[f"b{int(kind[1:]) // len(parts)}"])
                for i, register in enumerate(parts):
                    self._write(register, half[i :: len(parts)], active)
            case ["mov", ("b32" | "b64") as kind] if operands[1].startswith("{"):
                parts = _braced(operands[1])
                half = f"b{int(kind[1:]) // len(parts)}"
                words = [np.broadcast_to(self._read(p, half), active.shape) for p in parts]
                self._write(operands[0], np.stack(words, 1).reshape(-1).view(_BITS[kind]), active)
            case _:
                operation = _operation(opcode)
                if len(operands) - 1 != len(operation.sources):
                    raise Unsupported("a number of operands that it should not have")
                sources = [
                    self._read(operand, kind)
                    for operand, kind in zip(operands[1:], operation.sources, strict=True)
                ]
                with np.errstate(all="ignore"):
                    self._write(operands[0], operation.compute(*sources), active)
        return None

    def _read(self, operand: str, kind: str) -> Any:
        """Its bits as the type `kind`, for each thread or as a scalar."""
        dtype = np.dtype(_TYPES[kind])
        if kind == "pred" and operand in ("0", "-1"):
            return np.bool_(operand == "-1")
        if kind == "pred":
            negated, name = operand.startswith("!"), operand.lstrip("!")
            if name not in self.registers:
                raise BadAccess(f"{name} is read before it is written")
            return ~self.registers[name] if negated else self.registers[name]
        if operand in self.special:
            value = self.special[operand]
        elif operand.startswith("%"):
            if operand not in self.registers:
                raise BadAccess(f"{operand} is read before it is written")
            value = self.registers[operand]
        elif match := re.fullmatch(r"0[fF]([0-9a-fA-F]{8})", operand):
            value = np.uint32(int(match[1], 16))
        elif match := re.fullmatch(r"(-?(?:0x[0-9a-fA-F]+|\d+))U?", operand):
            bits = _BITS[f"b{dtype.itemsize * 8}"]
            value = bits(int(match[1], 0) % (1 << dtype.itemsize * 8))
        elif operand in self.kernel.shared:
            value = _BITS[f"b{dtype.itemsize * 8}"](self.kernel.shared[operand])
        else:
            raise Unsupported(f"the operand {operand}")
        if value.dtype.itemsize != dtype.itemsize:
            raise Unsupported(f"{operand} has {value.dtype.itemsize} bytes, not {dtype.itemsize}")
        return value.view(dtype)

    def _write(self, register: str, value: Any, active: np.ndarray) -> None:
        if register == "_":
            return
        prefix = re.match(r"%[a-z]+", register)
        kind = self.kernel.registers.get(prefix[0]) if prefix else None
        if kind is None:
            raise Unsupported(f"the operand {register}")
        dtype = np.dtype(_BITS[kind])
        value = np.asarray(value)
        if value.dtype.itemsize != dtype.itemsize:
            raise Unsupported(f"{register} has {dtype.itemsize} bytes, not {value.dtype.itemsize}")
        value = value.view(dtype)
        if value.shape and active.all():
            self.registers[register] = value
            return
        if register not in self.registers:
            poison = dtype.type(0 if kind == "pred" else _POISON % (1 << 8 * dtype.itemsize))
            self.registers[register] = np.full(active.shape, poison)
        self.registers[register] = np.where(active, value, self.registers[register])

    def _memory(self, space: str) -> Memory:
        if space not in ("global", "shared"):
            raise Unsupported(f"memory that is .{space}")
        return self.memory if space == "global" else self.shared

    def _address(self, operand: str) -> np.ndarray:
        match = re.fullmatch(r"\[\s*([\w%]+)\s*(?:\+\s*(-?\w+)\s*)?\]", operand)
        if match is None:
            raise Unsupported(f"the address {operand}")
        name, offset = match.groups()
        wide = self.kernel.registers.get(name.rstrip("0123456789")) == "b64"
        base = self._read(name, "b64" if wide else "b32")
        return np.broadcast_to(base, self.at.shape).astype(np.int64) + int(offset or "0", 0)

    def _matrices(self, name: str, registers: list[str], rows: np.ndarray, active) -> None:
        """Eight rows of four words each, one of them a thread's; a row's address is another's."""
        lane, rows = np.arange(_WARP), rows.reshape(-1, _WARP)
        for i, register in enumerate(registers):
            addresses = (rows[:, 8 * i + lane // 4] + 4 * (lane % 4)).reshape(-1)
            if name == "ldmatrix":
                [word] = self.shared.load(addresses, active, 1, np.dtype(np.uint32))
                self._write(register, word, active)
            else:
                self.shared.store(addresses, active, [self._read(register, "b32")])

    def _shuffle(self, mode: str, value: str, amount: str, clamp: str, mask: str) -> np.ndarray:
        if (clamp, mask) != ("31", "-1"):
            raise Unsupported("a shuffle of some threads of a warp")
        words = np.broadcast_to(self._read(value, "b32"), self.at.shape).reshape(-1, _WARP)
        by = np.broadcast_to(self._read(amount, "b32"), self.at.shape).reshape(-1, _WARP)
        lane = np.arange(_WARP, dtype=np.int64)
        by = by.astype(np.int64)
        source = {"bfly": lane ^ by, "idx": by, "up": lane - by, "down": lane + by}.get(mode)
        if source is None:
            raise Unsupported(f"shfl.sync.{mode}")
        source = np.where((source < 0) | (source >= _WARP), lane, source)
        return np.take_along_axis(words, source, 1).reshape(-1)

    def _check_barrier(self, active: np.ndarray) -> None:
        blocks = (active | (self.at == len(self.kernel.instructions))).reshape(
            -1, self.kernel.threads
        )
        if np.any(blocks.any(1) & ~blocks.all(1)):
            raise BadAccess("some threads of a block are not at the barrier")


def _braced(operand: str) -> list[str]:
    """The registers of a vector, or the one register."""
    return [name.strip() for name in operand.strip("{} ").split(",")]


def _access(modifiers: list[str]) -> tuple[int, Any]:
    """How many words of what type `ld` or `st` moves."""
    *modifiers, kind = [m for m in modifiers if m not in ("nc", "relaxed", "L1::evict_last")]
    count = int(modifiers.pop()[1:]) if modifiers and modifiers[-1] in ("v2", "v4", "v8") else 1
    if modifiers or kind not in _TYPES or kind == "pred":
        raise Unsupported("a modifier of the access")
    return count, np.dtype(_BITS[f"b{np.dtype(_TYPES[kind]).itemsize * 8}"])


# ---- What the arithmetic instructions compute.


class _Operation(NamedTuple):
    sources: list[str]  # types
    compute: Callable[..., Any]


_BITWISE = {"and": operator.and_, "or": operator.or_, "xor": operator.xor}
_ARITHMETIC: dict[str, Callable[..., Any]] = {
    "add": operator.add,
    "sub": operator.sub,
    "mul": operator.mul,
    "min": np.minimum,
    "max": np.maximum,
}
_COMPARISONS: dict[str, Callable[..., Any]] = {
    name: getattr(operator, name) for name in ("eq", "ne", "lt", "le", "gt", "ge")
}


@functools.cache
def _operation(opcode: str) -> _Operation:
    """The types that `opcode` reads, and the function. Its result has the type that it says."""
    match opcode.split("."):
        case ["fma", "rn", "f32"]:
            return _Operation(["f32"] * 3, _fma)
        case [("add" | "sub" | "mul" | "min" | "max") as name, *mode, "f32"] if mode in (
            [],
            ["rn"],
        ):
            return _Operation(["f32"] * 2, _ARITHMETIC[name])
        case ["fma", "rn", "f32x2"]:
            return _Operation(["b64"] * 3, _of_pairs(_fma))
        case [("add" | "sub" | "mul") as name, "rn", "f32x2"]:
            return _Operation(["b64"] * 2, _of_pairs(_ARITHMETIC[name]))
        case [("add" | "sub" | "min" | "max") as name, kind] if kind in _INTEGERS:
            return _Operation([kind] * 2, _ARITHMETIC[name])
        case ["mul", ("lo" | "hi" | "wide") as part, kind] if kind in _INTEGERS:
            return _Operation([kind] * 2, functools.partial(_product, part))
        case ["mad", ("lo" | "hi" | "wide") as part, kind] if kind in _INTEGERS:
            addend = f"{kind[0]}{2 * int(kind[1:])}" if part == "wide" else kind
            return _Operation([kind, kind, addend], lambda a, b, c: _product(part, a, b) + c)
        case [("div" | "rem") as name, kind] if kind in _INTEGERS:
            return _Operation([kind] * 2, functools.partial(_division, name))
        case ["neg", kind] if kind in _SIGNED or kind == "f32":
            return _Operation([kind], operator.neg)
        case ["abs", kind] if kind in _SIGNED or kind == "f32":
            return _Operation([kind], np.abs)
        case [("and" | "or" | "xor") as name, kind] if kind in _BITS:
            return _Operation([kind] * 2, _BITWISE[name])
        case ["not", kind] if kind in _BITS:
            return _Operation([kind], operator.invert)
        case ["shl", kind] if kind in _BITS:
            return _Operation([kind, "u32"], lambda a, n: _shift(operator.lshift, a, n))
        case ["shr", kind] if kind in _INTEGERS or kind in _BITS:
            return _Operation([kind, "u32"], lambda a, n: _shift(operator.rshift, a, n))
        case ["setp", *comparison, kind] if kind in _TYPES:
            return _comparison(kind, *comparison)
        case ["selp", kind] if kind in _TYPES:
            return _Operation([kind, kind, "pred"], lambda a, b, p: np.where(p, a, b))
        case ["mov", kind] if kind in _TYPES:
            return _Operation([kind], lambda a: a)
        case ["cvta", "to", "global", "u64"]:
            return _Operation(["u64"], lambda a: a)
        case ["cvt", *mode, to, kind] if kind in _TYPES:
            return _conversion(mode, to, kind)
        case ["prmt", "b32"]:
            return _Operation(["u32"] * 3, _permute)
        case ["bfe", "u32"]:
            return _Operation(["u32"] * 3, lambda a, b, c: (a >> b) & ((np.uint32(1) << c) - 1))
    raise Unsupported(opcode)


def _fma(a, b, c):
    a, b, c = (np.asarray(v, np.float64) for v in (a, b, c))
    return (a * b + c).astype(np.float32)  # the product is exact


def _of_pairs(compute: Callable[..., Any]) -> Callable[..., Any]:
    """`compute` of both float32 halves of 64-bit operands."""

    def both(*operands):
        wide = [np.ascontiguousarray(operand) for operand in np.broadcast_arrays(*operands)]
        return compute(*(operand.view(np.float32) for operand in wide)).view(np.uint64)

    return both


def _product(part: str, a, b):
    dtype = a.dtype
    bits = 8 * dtype.itemsize
    if part == "lo":
        return a * b
    if bits == 64:
        raise Unsupported("a product of 128 bits")
    wide = np.dtype(f"{dtype.kind}{2 * dtype.itemsize}")
    product = np.asarray(a, wide) * np.asarray(b, wide)
    return product if part == "wide" else (product >> bits).astype(dtype)


def _division(name: str, a, b):
    if np.any(b == 0):
        raise BadAccess("a division by zero")
    quotient = np.abs(a) // np.abs(b) * np.sign(a) * np.sign(b)  # truncated
    return quotient.astype(a.dtype) if name == "div" else (a - quotient * b).astype(a.dtype)


def _shift(shift, a, count):
    bits = 8 * a.dtype.itemsize
    shifted = shift(a, np.minimum(count, bits - 1).astype(a.dtype))
    if a.dtype.kind == "i" and shift is operator.rshift:
        return shifted  # a shift by more leaves the sign, and so does this
    return np.where(count < bits, shifted, a.dtype.type(0))


def _comparison(kind: str, name: str, combine: str = "") -> _Operation:
    """`setp`, of which a float32 has those that are true of a NaN, as ltu."""
    unordered = kind == "f32" and name.endswith("u")
    compare = _COMPARISONS.get(name[:-1] if unordered else name)
    if compare is None or combine not in ("", *_BITWISE):
        raise Unsupported(f"setp.{name}.{combine}")

    def compute(a, b, *with_):
        result = compare(a, b)
        if kind == "f32":
            nan = np.isnan(a) | np.isnan(b)
            result = result | nan if unordered else result & ~nan
        return _BITWISE[combine](result, *with_) if combine else result

    return _Operation([kind, kind, *["pred"] * bool(combine)], compute)


def _conversion(mode: list[str], to: str, kind: str) -> _Operation:
    """`cvt`: without a mode where every value is kept or bits are cut off."""
    rounded = mode == ["rn"] and kind == "f32"
    if to in ("bf16x2", "f16x2") and rounded:
        half = _HALVES[to[:-2]]

        def pack(high, low):
            parts = [np.asarray(a).astype(half).view(np.uint16) for a in (low, high)]
            return np.stack(np.broadcast_arrays(*parts), -1).view(np.uint32)[..., 0]

        return _Operation([kind] * 2, pack)
    widened = not mode and to == "f32" and kind in _HALVES
    resized = not mode and to in _INTEGERS and kind in _INTEGERS
    from_integer = mode == ["rn"] and to == "f32" and kind in _INTEGERS
    if widened or resized or from_integer or (rounded and to in _HALVES):
        return _Operation([kind], lambda a: a.astype(_TYPES[to]))
    raise Unsupported(f"cvt.{'.'.join(mode)}.{to}.{kind}")


def _permute(a, b, selector):
    """`prmt`: four bytes out of the eight of b and a."""
    if np.any(selector & np.uint32(0x8888)):
        raise Unsupported("prmt that repeats signs")
    eight = a.astype(np.uint64) | (b.astype(np.uint64) << np.uint64(32))
    result = np.uint32(0)
    for i in range(4):
        index = ((selector >> np.uint32(4 * i)) & np.uint32(7)).astype(np.uint64)
        byte = (eight >> (np.uint64(8) * index)) & np.uint64(0xFF)
        result = result | (byte.astype(np.uint32) << np.uint32(8 * i))
    return result
