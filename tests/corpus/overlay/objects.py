"""What the collector would go through beside what the script has made: no frame, no exception, no module unasked for."""

import gc
import sys
import types

WITHIN = (types.FrameType, types.TracebackType, BaseException)
objects = gc.get_objects()
print([type(found).__name__ for found in objects if isinstance(found, WITHIN)])
print([found.__name__ for found in objects if isinstance(found, types.ModuleType) and found.__name__ == "resource"])
print("resource" in sys.modules)
