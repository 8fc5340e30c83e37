"""The overlay `aos_context`, tested as it runs alone: it imports nothing from the bus.

Its package is importable from here on, as it is from inside its folder.
"""

from __future__ import annotations

import sys
from pathlib import Path

OVERLAY = Path(__file__).parent.parent.parent / "overlays" / "aos_context"

sys.path.insert(0, str(OVERLAY))
