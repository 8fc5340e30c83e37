"""The main file of a helper: of the process that contains it (`containment.py`) and of what starts programs in there.

It is small since an interpreter holds the syntax tree of its main file until that has ended: in mode fork each call
would let go of it anew, page by page.
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
run, argv, env = inside.main()
run(argv, env)
