import sys

sys.path.insert(0, "more")
import wanted  # noqa: E402

print(wanted.WHERE)
