"""bench/compare.py: the grid it runs, where it goes on, and what it draws of the rows."""

import sys

import common
import compare
import pytest


@pytest.fixture
def run(small, tmp_path, monkeypatch):
    """Runs the bench on eight random images; returns the rows that its results file then holds."""
    flags = ["--checkpoint", small / "resnet20.pt", "--dset", small / "images.npz", "--images", 4]
    flags += ["--out", tmp_path / "grid.csv", "--schedule", 0, "--k_step", 1, "--max_CG_iterations", 1]
    flags += ["--joint_steps", 1, "--joint_CG_iterations", 1]

    def once(*more):
        monkeypatch.setattr(sys, "argv", ["compare.py", "resnet20", *map(str, [*flags, *more])])
        compare.main()
        return common.read(tmp_path / "grid.csv")

    return once


def test_a_grid_is_measured_once_and_goes_on_where_it_stopped(run, tmp_path, capsys):
    grid = ["--masks", "MP", "Wanda", "--patterns", "2:4", "0.5", "--seeds", 0, 1, "--ways", "alone"]
    rows = run(*grid[:-5], "--seeds", 0, "--ways", "alone")
    assert [(row["pattern"], row["mask"]) for row in rows] == [
        (pattern, mask) for pattern in ("2:4", "0.5") for mask in ("MP", "Wanda")
    ]
    assert rows[2]["sparsity"] >= 0.5 > rows[0]["sparsity"]
    capsys.readouterr()
    more = run(*grid)
    assert more[:4] == rows
    assert [row["mask"] for row in more[4:]] == ["Wanda"] * 2  # magnitude alone knows no seed
    assert "1 of 2: 2:4 Wanda alone 1" in capsys.readouterr().out
    assert run(*grid) == more
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "| pattern | mask | alone |"
    assert [line.split(" | ")[:2] for line in lines[2:]] == [
        [f"| {pattern}", mask] for pattern in ("0.5", "2:4") for mask in ("MP", "Wanda")
    ]
    assert ["±" in line for line in lines[2:]] == [False, True, False, True]
    assert (tmp_path / "figures" / "grid.png").read_bytes().startswith(b"\x89PNG")


def test_the_whole_grid_holds_every_method_and_other_images_are_other_rows(run, capsys):
    flags = ["resnet20", "--dset", "images.npz"]
    runs = compare.grid(compare.parser().parse_args(flags))
    assert len(runs) == 8 * (4 * 3 * 3 - 2) - 3 * 3 * 3  # patterns, masks, ways, seeds; without OBS under N:M
    assert {run["pattern"] for run in runs} == {"0.5", "0.6", "0.7", "0.8", "0.9", "2:4", "1:4", "2:8"}
    grid = ["--masks", "MP", "--patterns", "2:4", "--seeds", 0, "--ways", "alone"]
    run(*grid)
    capsys.readouterr()
    rows = run(*grid, "--images", 6)
    assert [row["images"] for row in rows] == [4, 6]
    assert len(capsys.readouterr().out.splitlines()) == 1 + 3  # its own row, and a table of nothing else


def test_what_cannot_be_run_is_refused(run):
    with pytest.raises(compare.UsageError, match="pattern 'half' is neither N:M nor a sparsity"):
        run("--patterns", "half")
    with pytest.raises(compare.UsageError, match="outside"):
        run("--patterns", "1.5")


def test_a_row_that_the_network_does_not_allow_is_left_out(run, capsys):
    grid = ["--masks", "MP", "--seeds", 0, "--ways", "alone", "--patterns"]
    rows = run(*grid, "0.999999", "0.5")
    assert [row["pattern"] for row in rows] == ["0.5"]
    assert "1 of 2: 0.999999 MP alone 0: left out: target sparsity 0.999999 is out of reach" in capsys.readouterr().out


def test_a_grid_of_which_nothing_can_be_measured_is_refused(run):
    with pytest.raises(compare.UsageError, match="no row"):
        run("--masks", "MP", "--seeds", 0, "--ways", "alone", "--patterns", "0.999999")


def test_a_row_is_of_the_options_that_its_way_depends_on(run, capsys):
    grid = ["--masks", "MP", "--patterns", "2:4", "--seeds", 0]
    run(*grid)
    capsys.readouterr()
    rows = run(*grid, "--newton_steps", 2)
    assert [(row["way"], row["options"]["newton_steps"]) for row in rows] == [
        ("alone", 1), ("MP+", 1), ("SNOWS", 1), ("alone", 2), ("SNOWS", 2),
    ]  # fmt: skip
    *_, line = capsys.readouterr().out.splitlines()
    assert "|  |" not in line  # the least squares are in the table of both
