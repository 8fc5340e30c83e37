import os

WORD = os.environ.get("CORPUS_WORD", "not set")
