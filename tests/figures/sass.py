"""Counts the instructions of SASS, what ptxas makes of PTX and a GPU executes."""

import re
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from figures import ptx

# The execution units that may be what a kernel waits for. IMAD runs where FFMA does.
_FP32 = r"[FI]MUL|FFMA|FADD|IMAD|HFMA2|HADD2|HMUL2"
_ALU = (
    r"IADD|LOP3|PRMT|SEL|FSEL|ISETP|FSETP|LEA|SHF|MOV|PLOP3|F2FP|VIADD|V?IMNMX|FMNMX|IABS|BMSK|SGXT"
)
_ARITHMETIC = r"FFMA|FMUL|FADD"
_PTX_ARITHMETIC = r"(fma|mul|add|sub)\.(rn\.)?f32(x2)?"


class Function(NamedTuple):
    opcodes: list[str]
    loops: list[tuple[int, int]]  # first and behind the last of each, by where they end


class Counts(NamedTuple):
    """Instructions that a warp executes."""

    issue: float
    fp32: float
    alu: float


def parse(text: str) -> dict[str, Function]:
    """The functions in what `nvdisasm -c` prints."""
    sections = re.split(r"^\.text\.([\w$]+):$", text, flags=re.M)
    return {
        name: _function(body) for name, body in zip(sections[1::2], sections[2::2], strict=True)
    }


def _function(body: str) -> Function:
    opcodes: list[str] = []
    labels, loops = {}, []
    for label, opcode, target in re.findall(
        r"^(\.L\w+):|^\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([\w.]+)[^;\n]*?(\.L\w+)?[)\s]*;",
        body,
        re.M,
    ):
        if label:
            labels[label] = len(opcodes)
            continue
        opcodes.append(opcode)
        if opcode.startswith("BRA") and labels.get(target, len(opcodes)) < len(opcodes) - 1:
            loops.append((labels[target], len(opcodes)))
    # A branch to itself and NOPs fill up the end.
    while opcodes and (opcodes[-1] == "NOP" or opcodes[-1].startswith("BRA")):
        opcodes.pop()
    return Function(opcodes, loops)


def registers_and_spills(report: str, name: str) -> tuple[int, int]:
    """Of a kernel, the spills in bytes, from what `ptxas -v` reports."""
    section = re.search(rf"entry function '{re.escape(name)}'.*?(?=Compiling|\Z)", report, re.S)
    text = section[0] if section else ""
    registers = re.search(r"Used (\d+) registers", text)
    spills = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", text)
    if registers is None or spills is None:
        raise RuntimeError(f"ptxas reports no registers of {name}: {report}")
    return int(registers[1]), int(spills[1]) + int(spills[2])


def count(function: Function, kernel: ptx.Kernel, executed: np.ndarray) -> Counts:
    """What an average warp executes, if it executes `executed` of the instructions of the PTX.

    The loops of the SASS are those of the PTX, unrolled or not, so how often one runs follows from
    the arithmetic in it. Where ptxas got rid of a loop, this holds for the whole kernel only.
    """
    ptx_opcodes = [instruction.opcode for instruction in kernel.instructions]
    inside = _innermost(len(function.opcodes), function.loops)
    ptx_inside = _innermost(len(ptx_opcodes), _ptx_loops(kernel))
    if inside.max() != ptx_inside.max():
        inside, ptx_inside = np.zeros_like(inside), np.zeros_like(ptx_inside)
    arithmetic = _matches(_ARITHMETIC, function.opcodes)
    ptx_arithmetic = _matches(_PTX_ARITHMETIC, ptx_opcodes)
    times = np.zeros(len(function.opcodes))
    for loop in range(-1, inside.max() + 1):
        here, ptx_here = inside == loop, ptx_inside == loop
        terms, ptx_terms = arithmetic & here, ptx_arithmetic & ptx_here
        if loop >= 0 and terms.any() and ptx_terms.any():
            times[here] = executed[ptx_terms].sum() / terms.sum()
        elif ptx_here.any():
            times[here] = executed[ptx_here].mean()
    return Counts(
        float(times[~_matches("NOP", function.opcodes)].sum()),
        float(times[_matches(_FP32, function.opcodes)].sum()),
        float(times[_matches(_ALU, function.opcodes)].sum()),
    )


def _ptx_loops(kernel: ptx.Kernel) -> list[tuple[int, int]]:
    loops = []
    for i, instruction in enumerate(kernel.instructions):
        if instruction.opcode.startswith("bra"):
            start = kernel.labels[instruction.operands[0]]
            if start <= i:
                loops.append((start, i + 1))
    return loops


def _innermost(length: int, loops: Sequence[tuple[int, int]]) -> np.ndarray:
    """The index of the loop that each instruction is in, or -1."""
    inside = np.full(length, -1)
    for i, (start, end) in reversed(list(enumerate(loops))):  # inner loops end first
        inside[start:end] = i
    return inside


def _matches(pattern: str, opcodes: Sequence[str]) -> np.ndarray:
    return np.array([re.match(rf"({pattern})(\W|\d|$)", opcode) is not None for opcode in opcodes])
