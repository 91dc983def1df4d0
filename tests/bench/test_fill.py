"""bench/fill.py: the tables of README.md and docs/ are what the results files hold."""

import re
import subprocess
import sys
from fnmatch import fnmatch

import fill
import pytest
import tables
from headline_tables import is_most
from helpers import ROOT

RESULTS_PAGE = ROOT / "docs" / "results.md"


@pytest.mark.parametrize("page", fill.pages(), ids=lambda page: page.name)
def test_every_table_is_what_the_results_files_hold(page):
    assert fill.stale(page.read_text()) == []


def test_every_table_stands_on_a_page():
    found = {name for page in fill.pages() for name in fill.names(page.read_text())}
    assert found == tables.TABLES.keys()


def test_the_results_page_names_only_files_and_headings_that_there_are():
    text = RESULTS_PAGE.read_text()
    targets = [ROOT / "docs" / target for target in re.findall(r"\]\(([^)#:]+)\)", text)]
    targets += [ROOT / script for script in re.findall(r"python (\S+\.py)", text)]
    assert [str(target) for target in targets if not target.exists()] == []
    headings = {re.sub(r"[^\w -]", "", line[3:]).lower().replace(" ", "-") for line in re.findall("^## .*", text, re.M)}
    assert set(re.findall(r"\]\(#(.*?)\)", text)) == headings


def test_the_headline_is_five_rows_of_a_network_each():
    lines = tables.headline().splitlines()
    assert lines[0].endswith("| dense | mask only (MP) | MP+ | SNOWS | SNOWS, masks by ALPS | and mixtures |")
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:7]]
    for *_, dense, mask, squares, solved, masks, mixtures in rows:
        assert float(dense) > float(solved) > float(squares) > float(mask)
        for most in filter(None, (masks, mixtures)):
            assert float(dense) > float(most) > float(solved)
    assert all(any(row[column] for row in rows) for column in (-1, -2))
    assert lines[7:8] == [""]
    assert len(lines) == 9


@pytest.mark.parametrize("mixtures", [False, True])
def test_the_headlines_last_columns_are_of_all_images_and_the_best_masks(mixtures):
    best = "--mixtures 1 " * mixtures + "--permute --mask_alg ALPS"
    flags = {"--mask_alg ALPS": False, best: True, "--permute": False, "": False, f"--joint_steps 8 {best}": False}
    flags["--permute --mask_alg ALPS" if mixtures else "--mixtures 1 --permute --mask_alg ALPS"] = False
    row = {"images": 3000, "pattern": "2:4"}
    assert {text: is_most({**row, "flags": text}, mixtures) for text in flags} == flags
    unstructured = "--schedule 4 " + "--mixtures 1 " * mixtures + "--mask_alg ALPS"
    assert is_most({**row, "pattern": "unstructured 0.9", "flags": unstructured}, mixtures)
    assert not is_most({**row, "images": 1024, "flags": best}, mixtures)


def test_a_table_is_filled_where_its_mark_stands():
    page = "Before.\n\n<!-- scaling -->\n| old |\n<!-- end -->\n\nAfter.\n"
    filled = fill.fill(page)
    assert filled == f"Before.\n\n<!-- scaling -->\n{tables.scaling()}\n<!-- end -->\n\nAfter.\n"
    assert (fill.stale(page), fill.stale(filled)) == (["scaling"], [])


@pytest.mark.parametrize("names", [["scaling", "scaling"], ["nothing_measured"]])
def test_a_table_that_stands_twice_or_is_unknown_is_refused(names):
    page = "".join(f"<!-- {name} -->\n<!-- end -->\n" for name in names)
    with pytest.raises(ValueError, match=f"unknown or stand twice: {names[0]}$"):
        fill.fill(page)


def test_the_check_tells_stale_tables_and_writes_nothing(tmp_path, monkeypatch, capsys):
    (tmp_path / "docs").mkdir()
    page = tmp_path / "docs" / "a.md"
    page.write_text("<!-- scaling -->\n<!-- end -->\n")
    (tmp_path / "README.md").write_text("No table.\n")
    monkeypatch.setattr(fill, "ROOT", tmp_path)

    def ended(*flags):
        monkeypatch.setattr(sys, "argv", ["fill.py", *flags])
        with pytest.raises(SystemExit) as end:
            fill.main()
        return int(end.value.code), capsys.readouterr().out

    assert ended("--check") == (1, "docs/a.md: stale: scaling\n")
    assert page.read_text() == "<!-- scaling -->\n<!-- end -->\n"
    assert ended() == (0, "docs/a.md: filled: scaling\n")
    assert ended("--check") == (0, "")


def test_no_results_file_is_read_with_anything_but_the_standard_library():
    code = "import sys; import tables; tables.headline(); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT / "bench", capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


def test_every_results_file_is_described():
    described = re.findall(r"^\| (`.*?) \|", (ROOT / "results" / "README.md").read_text(), re.MULTILINE)
    names = [name.replace("…", "*") for cell in described for name in re.findall(r"`(\S+)`", cell)]
    files = [file.stem for file in (ROOT / "results").glob("*.csv")]
    assert [file for file in files if not any(fnmatch(file, name) for name in names)] == []
