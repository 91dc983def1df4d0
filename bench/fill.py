"""Write the tables of README.md and docs/*.md from the files in results/, so that every figure comes from one of them.

    python bench/fill.py [--check]

A table stands between `<!-- NAME -->` and `<!-- end -->`; its name is one of bench/tables.py. --check writes nothing
and fails if a table is not what the results files hold.
"""

import argparse
import re
import sys
from pathlib import Path

from common import ROOT
from tables import TABLES

BLOCK = re.compile(r"<!-- (\w+) -->\n(.*?)<!-- end -->", re.DOTALL)


def pages() -> list[Path]:
    """The files that tables stand in."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def names(text: str) -> list[str]:
    """The tables of a page."""
    return [name for name, _ in BLOCK.findall(text)]


def fill(text: str) -> str:
    """A page with all of its tables written anew.

    Raises:
        ValueError: it has a table twice, or one that there is not.
    """
    found = names(text)
    wrong = [name for name in found if name not in TABLES or found.count(name) > 1]
    if wrong:
        raise ValueError(f"tables that are unknown or stand twice: {', '.join(dict.fromkeys(wrong))}")
    return BLOCK.sub(lambda match: f"<!-- {match[1]} -->\n{TABLES[match[1]]()}\n<!-- end -->", text)


def stale(text: str) -> list[str]:
    """The tables of a page that are not what the results files hold."""
    now = dict(BLOCK.findall(fill(text)))
    return [name for name, content in BLOCK.findall(text) if content != now[name]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="only say which tables are stale; exit code 1 if one is")
    check, behind = parser.parse_args().check, False
    for page in pages():
        text = page.read_text()
        try:
            found = stale(text)
        except ValueError as error:
            sys.exit(f"error: {page.relative_to(ROOT)}: {error}")
        behind = behind or bool(found)
        if found:
            print(f"{page.relative_to(ROOT)}: {'stale' if check else 'filled'}: {', '.join(found)}")
        if found and not check:
            page.write_text(fill(text))
    sys.exit(check and behind)


if __name__ == "__main__":
    main()
