"""Writes the tables of README.md that are made from code: `python TOOLS/readme.py`.

With `--check` it writes nothing and exits 1 where they are not up to date; a test holds README to that.
"""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from bus import settings  # noqa: E402
from bus.errors import CATALOGUE  # noqa: E402

README = ROOT / "README.md"


def settings_table() -> str:
    rows = [f"| `{row.env}` | `{_shown(row.default)}` | {row.help} | {row.allowed} |" for row in settings.table()]
    return "\n".join(["| variable | default | what it is | allowed |", "|---|---|---|---|", *rows])


def errors_table() -> str:
    rows = [f"| `{e.code}` | {e.http_status} | {e.category} | {e.message} |" for e in CATALOGUE.values()]
    return "\n".join(["| code | HTTP | category | what it says |", "|---|---|---|---|", *rows])


def fill(text: str) -> str:
    """README with its tables made anew; each stands between `<!-- name -->` and `<!-- /name -->`."""
    for name, table in (("settings", settings_table()), ("errors", errors_table())):
        before, opening, rest = text.partition(f"<!-- {name} -->\n")
        _, closing, after = rest.partition(f"<!-- /{name} -->")
        text = f"{before}{opening}{table}\n{closing}{after}"
    return text


def _shown(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def main(arguments: list[str]) -> int:
    text = README.read_text("utf-8")
    if "--check" in arguments:
        return int(fill(text) != text)
    README.write_text(fill(text), "utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
