import os

os.environ["CORPUS_WORD"] = "set"
import reads_environment  # noqa: E402

print(reads_environment.WORD)
