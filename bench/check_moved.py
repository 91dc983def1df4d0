"""Check that every figure of the former results files, results/*.json, stands in the CSV files that replaced them.

    python bench/check_moved.py bf943da

REVISION is a commit that has the JSON files. Each of their rows is held against the row at the same place in the new
file: every number and text of the former must stand there under the same name. What a former file says beside its
rows must stand as often in the new ones, and every line of its Markdown tables in docs/results.md.
"""

import argparse
import ast
import json
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from common import RESULTS, ROOT, read, settings

PARTS = {  # a former file -> the files that hold its parts, beside the one of its name
    "convergence_resnet20_cifar10": ["convergence_resnet20_cifar10_needed"],
    "convergence_vit_cifar10": ["convergence_vit_cifar10_needed"],
    "imagenet_random_weights": ["imagenet_random_weights_layers"],
    "scaling": ["scaling_slopes"],
}
RUNS = ("resnet20_digits", "vit_digits")  # former files of one run each, now the rows of one file


def show(revision: str, path: str) -> str:
    """A file as it was."""
    command = ["git", "show", f"{revision}:{path}"]
    return subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout


def former_files(revision: str) -> list[str]:
    """The results files of a commit that have been replaced."""
    command = ["git", "ls-tree", "--name-only", revision, "results/"]
    names = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout.split()
    return [name for name in names if name.endswith((".json", ".md")) and not (ROOT / name).exists()]


def leaves(item: object, name: str = "") -> Iterator[tuple[str, object]]:
    """Every number and text of nested dicts and lists, under the name that is nearest to it; empty ones left out."""
    if isinstance(item, dict):
        for key, inner in item.items():
            yield from leaves(inner, key)
    elif isinstance(item, list):
        for inner in item:
            yield from leaves(inner, name)
    elif item is not None:
        yield name, item


def of_row(row: dict) -> Iterator[tuple[str, object]]:
    """Every number and text of a row as it is now; its flags one by one."""
    yield from leaves(row)
    words = (row.get("flags") or "").split()
    for flag, word in zip(words[::2], words[1::2]):
        try:
            yield flag.removeprefix("--"), ast.literal_eval(word)
        except ValueError:
            yield flag.removeprefix("--"), word


def of_part(row: dict) -> Iterator[tuple[str, object]]:
    """Every figure of a part's row: under its own name, and of a layer's figures, which had the layer's, under that."""
    yield from leaves(row)
    yield from ((row["layer"], figure) for _, figure in leaves(row) if "layer" in row)


def lost(former: dict, rows: list[dict], parts: list[dict], of: dict) -> list[tuple[str, object]]:
    """What a former file held and the new ones do not."""
    before = former.get("rows", [])
    if len(before) > len(rows):
        return [("rows", len(before) - len(rows))]
    missing = []
    for old, new in zip(before, rows):
        own = (pair for part in parts if part.get("network") == new.get("network") for pair in of_part(part))
        missing += sorted(set(leaves(old)) - set(of_row(new)) - set(own), key=str)
    now = Counter(pair for row in rows for pair in of_row(row)) + Counter(leaves(of))
    now += Counter(pair for part in parts for pair in of_part(part))
    beside = Counter(leaves({name: item for name, item in former.items() if name != "rows"}))
    return missing + list((beside - now).elements())


def check(name: str, former: dict) -> tuple[int, list]:
    """How many numbers and texts a former file held, and those that are lost."""
    path = RESULTS / f"{'defaults' if name in RUNS else name}.csv"
    rows = [row for row in read(path) if name not in RUNS or row["arch"] == name]
    parts = [row for part in PARTS.get(name, []) for row in read(RESULTS / f"{part}.csv")]
    former = {"rows": [former]} if name in RUNS else former
    return sum(1 for _ in leaves(former)), lost(former, rows, parts, settings(path).get("of", {}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("revision")
    revision = parser.parse_args().revision
    total, failed = 0, False
    pages = (ROOT / "docs" / "results.md").read_text().splitlines()
    for file in former_files(revision):
        text = show(revision, file)
        if file.endswith(".md"):
            lines = text.splitlines()
            count, missing = len(lines), [line for line in lines if line not in pages]
        else:
            count, missing = check(Path(file).stem, json.loads(text))
        total, failed = total + count, failed or bool(missing)
        print(f"{file}: {count} {'lines' if file.endswith('.md') else 'numbers and texts'}, {len(missing)} lost")
        for each in missing[:10]:
            print(f"    {each}")
    print(f"{total} in all: {'SOME ARE LOST' if failed else 'none is lost'}")
    sys.exit(failed)


if __name__ == "__main__":
    main()
