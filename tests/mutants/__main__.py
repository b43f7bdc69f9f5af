"""Plants faults one by one, and tells which of them no test sees.

python tests/mutants --help
"""

import importlib
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[2]))
sys.exit(importlib.import_module("mutants.command").main(sys.argv))
