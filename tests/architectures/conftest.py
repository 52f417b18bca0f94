"""Puts this folder's helpers (tiny, checks) on the path."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
