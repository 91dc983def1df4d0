"""Write the tables of docs/options.md from the scripts' own parsers, so that no flag is left out or told otherwise.

python docs/make_options.py
"""

import argparse
import re
import runpy
import sys
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "options.md"
SCRIPTS = [f"{kind}_pruning/{pattern}.py" for kind in ("CNN", "VIT") for pattern in ("unstr", "prune_NM")]
DEFAULT = re.compile(r"\s*\(default: ((?:[^()]|\([^()]*\))*)\)")
BY_MACHINE = {"--device": "cuda if there is one, else cpu"}


class Found(Exception):
    """A script's parser, at the moment when it would read the command line."""


def parser_of(script: str) -> argparse.ArgumentParser:
    """The parser that a script builds, without running anything of what is behind it."""

    def stop(parser: argparse.ArgumentParser, *_):
        raise Found(parser)

    path, read = ROOT / script, argparse.ArgumentParser.parse_args
    with imports_from(path.parent):
        main = runpy.run_path(str(path), run_name="script")["main"]
        argparse.ArgumentParser.parse_args = stop
        try:
            main()
        except Found as found:
            return found.args[0]
        finally:
            argparse.ArgumentParser.parse_args = read
    raise RuntimeError(f"{script} reads no command line")


@contextmanager
def imports_from(folder: Path):
    """Modules of this folder come first; both folders have a utils.py, so that none is kept."""
    names, before, path = {file.stem for file in folder.glob("*.py")}, dict(sys.modules), list(sys.path)
    for name in names & before.keys():
        del sys.modules[name]
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        sys.path[:] = path
        for name in names & sys.modules.keys():
            del sys.modules[name]
        sys.modules.update({name: before[name] for name in names & before.keys()})


def block_of(group: str, script: str) -> str:
    """The block of options.md that a group of flags belongs to: patterns have one each, other groups one for all."""
    if group == "options":  # argparse's own name for flags of no group
        return "transformers"
    return {"unstr": "unstructured", "prune_NM": "N:M"}[Path(script).stem] if group == "pattern" else group


def flags() -> dict[str, dict[str, dict[str, argparse.Action]]]:
    """Block -> flag -> script -> how that script takes it."""
    found = {}
    for script in SCRIPTS:
        for group in parser_of(script)._action_groups:
            for action in group._group_actions:
                if action.option_strings and action.dest != "help":
                    block = found.setdefault(block_of(group.title, script), {})
                    block.setdefault(action.option_strings[-1], {})[script] = action
    return found


def help_of(action: argparse.Action) -> str:
    return action.help % vars(action)


def values_of(flag: str, action: argparse.Action) -> tuple[str, str]:
    """(default, the paper preset's value where it is another) of a flag."""
    if flag in BY_MACHINE:
        return BY_MACHINE[flag], ""
    told = next(filter(None, reversed(DEFAULT.findall(help_of(action)))), None)
    if told is None:
        default = action.default
        told = "" if default in (None, False, []) else " ".join(default) if isinstance(default, list) else str(default)
        told = "" if default in ({}, argparse.SUPPRESS) else told
    default, _, paper = told.partition("; paper: ")
    return default, paper


def row(flag: str, by_script: dict[str, argparse.Action]) -> list[str]:
    """A flag, its default (each folder's, where they differ), the paper's value, and what it means."""
    defaults = {script.split("_")[0]: values_of(flag, action) for script, action in by_script.items()}
    (action, *_), (first, *others) = by_script.values(), defaults.values()
    default, paper = first
    if any(other != first for other in others):
        default = "; ".join(f"{folder}: {value}" for folder, (value, _) in defaults.items())
    meaning = DEFAULT.sub("", help_of(action))
    if action.choices or action.nargs == "+":
        number = "one or more" if action.nargs == "+" else "one"
        meaning += f"; {number}" + (f" of {', '.join(map(str, action.choices))}" if action.choices else "")
    return [f"`{flag}`", default, paper, meaning]


def table(block: dict[str, dict[str, argparse.Action]]) -> str:
    """A Markdown table with a row per flag; without a column for the paper where its values are the defaults."""
    rows = [row(flag, by_script) for flag, by_script in block.items()]
    head = ["flag", "default", "paper", "meaning"]
    kept = [i for i in range(4) if i != 2 or any(cells[2] for cells in rows)]
    lines = [head, ["---"] * 4, *([re.sub(r"([|*])", r"\\\1", cell) for cell in cells] for cells in rows)]
    return "\n".join(f"| {' | '.join(cells[i] for i in kept)} |" for cells in lines)


def fill(text: str) -> str:
    """The page with every block between `<!-- flags: BLOCK -->` and `<!-- end flags -->` written anew.

    Raises:
        KeyError: a group of flags has no block on the page, or a block no flags.
    """
    tables = {name: table(block) for name, block in flags().items()}
    pattern = re.compile(r"<!-- flags: (.+?) -->\n.*?<!-- end flags -->", re.DOTALL)
    missing = tables.keys() ^ set(pattern.findall(text))
    if missing:
        raise KeyError(f"blocks without flags, or flags without a block: {', '.join(sorted(missing))}")
    return pattern.sub(lambda match: f"<!-- flags: {match[1]} -->\n{tables[match[1]]}\n<!-- end flags -->", text)


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    PAGE.write_text(fill(PAGE.read_text()))
