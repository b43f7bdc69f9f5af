"""A planted fault, and how it is planted."""

import importlib
from typing import Any, NamedTuple


class Operator(NamedTuple):
    """A mutation of cosmic-ray's, by the end of its name: "Lt_LtE" is that of < to <=."""

    name: str
    variant: int = 0  # of those that it has at one place

    def __str__(self) -> str:
        return f"{self.name}{f' {self.variant}' if self.variant else ''}"


class Fault(NamedTuple):
    """A piece of a file of the package, what becomes of it, and the tests that ought to see that.

    The piece is found once in the file, and the operator once in the piece: so a fault survives
    edits elsewhere, and an edit that it does not survive is an error.
    """

    file: str
    old: str
    new: str | Operator
    tests: str  # the arguments of pytest
    equivalent: str = ""  # why nothing can see it

    @property
    def name(self) -> str:
        old, new = (" ".join(str(text).split()) for text in (self.old, self.new))
        return f"{self.file}: {old} -> {new or 'nothing'}"


class NotPlanted(Exception):
    """The table is wrong about what is in the file."""


def faults(file: str, *rows: tuple[Any, ...]) -> list[Fault]:
    """Rows of a table, less the file that they have in common."""
    return [Fault(file, *row) for row in rows]


def planted(source: str, fault: Fault) -> str:
    """`source`, the text of the fault's file, with the fault in it."""
    if (count := source.count(fault.old)) != 1:
        raise NotPlanted(f"the piece is {count} times in the file")
    if isinstance(fault.new, str):
        mutated = source.replace(fault.old, fault.new)
    else:
        mutated = _mutated(source, fault.old, fault.new)
    if fault.file.endswith(".py"):
        compile(mutated, fault.file, "exec")
    return mutated


def _mutated(source: str, piece: str, wanted: Operator) -> str:
    plugins: Any = importlib.import_module("cosmic_ray.plugins")
    mutating: Any = importlib.import_module("cosmic_ray.mutating")
    [name] = [
        name
        for name in plugins.operator_names()
        if name.replace("/", "_").endswith(f"_{wanted.name}")
    ]
    mutation = plugins.get_operator(name)()
    places = _places(source, mutation)
    start = source.index(piece)
    within = [i for i, place in enumerate(places) if start <= place < start + len(piece)]
    if not within or len({places[i] for i in within}) > 1:
        raise NotPlanted(f"{name} is {len(within)} times in the piece")
    return mutating.mutate_code(source, mutation, within[wanted.variant])


def _places(source: str, mutation: Any) -> list[int]:
    """Where in the source each occurrence of a mutation starts, in cosmic-ray's order."""
    ast: Any = importlib.import_module("cosmic_ray.ast")
    starts = [0]
    for line in source.splitlines(keepends=True):
        starts.append(starts[-1] + len(line))
    places = []

    class Visitor(ast.Visitor):
        def visit(self, node):
            for (line, column), _ in mutation.mutation_positions(node):
                places.append(starts[line - 1] + column)
            return node

    Visitor().walk(ast.get_ast(source))
    return places
