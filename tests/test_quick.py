"""The list of the quick tests."""

import pathlib
import re

import quick


def test_functions():
    """Each one is there: what was renamed would leave the list without a word."""
    for file, names in quick.FUNCTIONS.items():
        source = (pathlib.Path(__file__).parent / file).read_text()
        assert set(names) <= set(re.findall(r"^def (\w+)\(", source, re.MULTILINE)), file
