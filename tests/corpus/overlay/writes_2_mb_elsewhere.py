import os
import tempfile

with tempfile.TemporaryDirectory() as folder:
    path = os.path.join(folder, "big")
    with open(path, "wb") as file:
        file.write(b"x" * 2_000_000)
    print(os.path.getsize(path))
