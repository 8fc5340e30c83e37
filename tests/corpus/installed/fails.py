import json

raise RuntimeError("as it loads")
