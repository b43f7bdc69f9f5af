"""The tables of other libraries' layers and networks."""

import subprocess
import sys
from pathlib import Path

import pytest

CLIENTS = Path(__file__).parent / "clients"


def table(*arguments):
    done = subprocess.run(
        [sys.executable, CLIENTS, *arguments], capture_output=True, text=True, check=True
    )
    header, _, *rows = (line.split("|")[1:-1] for line in done.stdout.splitlines())
    return [dict(zip(map(str.strip, header), map(str.strip, row), strict=True)) for row in rows]


def test_layers():
    for package in ("equinox", "haiku", "keras"):
        pytest.importorskip(package)
    rows = table("layers", "nnx.Conv`, 1-D|one of none|ConvTranspose`$")
    assert len(rows) == 2
    assert rows[0]["here"].startswith("0 of 3; without groups: ") and rows[1]["here"] == "3 of 3"
    assert all(float(row["installed"]) > 0 < float(row["lax"]) for row in rows)


def test_usage():
    done = subprocess.run([sys.executable, CLIENTS, "nothing"], capture_output=True, text=True)
    assert done.returncode == 1 and "python tests/clients layers" in done.stderr
