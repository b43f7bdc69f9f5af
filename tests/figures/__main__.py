"""What the kernels for GPUs and TPUs cost, from what they compile to.

python tests/figures gpu|tpu --help
"""

import importlib
import sys
from pathlib import Path

if sys.argv[1:2] not in (["gpu"], ["tpu"]):
    sys.exit(__doc__)
sys.path.insert(0, str(Path(__file__).parents[1]))
sys.exit(importlib.import_module(f"figures.{sys.argv[1]}").main(sys.argv[1:]))
