import json
import textwrap

print(json.WHOSE, textwrap.dedent("  x"))
import argparse  # noqa: E402

print(argparse.ArgumentParser(prog="x").format_usage())
