"""`python -m tests.vm [PYTEST ARGUMENTS]`: see the package."""

from __future__ import annotations

import sys

from tests import vm

LONGEST_S = 1800.0


def main() -> int:
    program = vm.kernel()
    if program is None:
        sys.stderr.write(f"there is no linux.uml on the PATH, nor in {vm.VARIABLE}; see tests/vm/__init__.py\n")
        return 2
    status, said = vm.boot(program, sys.argv[1:] or vm.ON_ITS_KERNEL, LONGEST_S, sys.stdout.buffer)
    if not sys.argv[1:] and "SKIPPED" in said:
        sys.stderr.write("tests that are for this kernel were skipped on it\n")
        return 1
    return 2 if status == vm.NO_STATUS else status


if __name__ == "__main__":
    sys.exit(main())
