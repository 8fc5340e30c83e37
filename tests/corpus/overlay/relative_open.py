import sys
from pathlib import Path

with open(__file__) as file:
    print(file.readline())
print(Path(sys.argv[0]).name, Path("package").is_dir())
