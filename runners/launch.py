"""The main file of a helper: of the process that contains it (`containment.py`) and of what starts programs in there.

Its folder is searched for modules only until the helper's own are loaded: a script is to find nothing of them.
"""

import os
import sys

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path[:] = [HERE] + [path for path in sys.path if os.path.realpath(path or ".") != os.path.realpath(HERE)]
import inside  # type: ignore[import-not-found]  # noqa: E402

if sys.argv[3:] != ["inside"]:
    import containment  # type: ignore[import-not-found]

    containment.contain()
sys.path.remove(HERE)
inside.main()
