"""bench/common.py: results files come back as they were written, and several processes fill one, each row once."""

import csv
import json
import multiprocessing
import sys
import time
from argparse import Namespace

import common
import pytest

import snows
from snows.cli.environment import machine

RUNS = [
    {"pattern": "2:4", "way": way, "seed": seed, "options": {"k_step": 4}}
    for way in ("alone", "SNOWS")
    for seed in (0, 1)
]


@pytest.fixture
def results(tmp_path):
    return common.Results(tmp_path / "table.csv")


def test_rows_come_back_as_they_were_written(tmp_path):
    rows = [
        {"pattern": "0.5", "weights": "82e07451", "flags": "", "seed": 0, "accuracy": 1 / 3, "permuted": True},
        {"pattern": "2:4", "weights": "", "flags": "--k 1", "seed": 1, "accuracy": 2e-300, "permuted": False},
    ]
    common.write(tmp_path / "a.csv", rows)
    assert common.read(tmp_path / "a.csv") == rows
    assert [type(value) for value in common.read(tmp_path / "a.csv")[0].values()] == [str, str, str, int, float, bool]
    assert not common.side_file(tmp_path / "a.csv").exists()
    common.write(tmp_path / "b.csv", [{"a": None, "b": 'a "word", and\nmore'}, {"c": [1, 2]}])
    assert common.read(tmp_path / "b.csv") == [
        {"a": None, "b": 'a "word", and\nmore', "c": None},
        {"a": None, "b": None, "c": [1, 2]},
    ]


def test_what_rows_share_is_kept_once_beside_them(tmp_path):
    path, shared = tmp_path / "a.csv", [{"k_step": 4, "targets": "dense"}, {"k_step": 8, "targets": "dense"}]
    rows = [{"options": shared[i], "seed": i} for i in (1, 0, 1)]
    common.write(path, [*rows, {"seed": 3}], {"weights.pt": "00000001"})
    assert common.read(path) == [*rows, {"options": None, "seed": 3}]
    kept = json.loads(common.side_file(path).read_text())
    assert kept == {"of": {"weights.pt": "00000001"}, "options": [shared[1], shared[0]]}
    assert list(csv.reader(path.open())) == [["seed", "options"], ["1", "0"], ["0", "1"], ["1", "0"], ["3", ""]]


def test_the_results_file_follows_the_flags(monkeypatch, capsys):
    def parsed(*flags):
        monkeypatch.setattr(sys, "argv", ["bench.py", *flags])
        parser = common.Parser("What is measured.", "table_{device}.csv", "--device")
        return parser.parse()

    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert parsed() == Namespace(device="cpu", threads=None, out=common.RESULTS / "table_cpu.csv")
    assert parsed("--device", "cuda:1").out.name == "table_cuda:1.csv"
    with pytest.raises(SystemExit, match="2"):
        parsed("--out", "table.json")
    assert "give a name that ends in .csv" in capsys.readouterr().err


def test_a_run_of_its_own_tells_its_figures_or_why_it_failed(tmp_path):
    script = tmp_path / "bench.py"
    script.write_text('import sys\nprint("on the way")\nprint(f\'{{"images": {sys.argv[1]}}}\')\n')
    assert common.one_run(str(script), 16) == {"images": 16}
    script.write_text("raise SystemExit('error: out of memory')")
    assert common.one_run(str(script)) == {"failed": "error: out of memory"}


def other_process(work, results):
    """A process that runs work(Results of its own, what it can tell), and where it tells it."""
    fork = multiprocessing.get_context("fork")
    told = fork.SimpleQueue()
    process = fork.Process(target=lambda: work(common.Results(results.path), told.put))
    process.start()
    return process, told


def test_a_row_that_is_held_is_not_measured_again(results):
    results.add({**RUNS[0], "accuracy": 90.0})
    results.add({**RUNS[1], "seed": 7})
    assert results.missing(RUNS) == RUNS[1:]
    assert [position for position, _ in results.claimed(RUNS)] == ["1 of 3", "2 of 3", "3 of 3"]
    assert results.rows()[0]["environment"]["python"] == sys.version.split()[0]
    results.replace([RUNS[3], {**RUNS[2], "environment": {"machine": "another"}}])
    assert [row["environment"]["machine"] for row in results.rows()] == [machine(), "another"]


def test_a_row_that_another_process_is_at_is_left_to_it_until_it_dies(results):
    def sit_on_the_first(results, tell):
        for _, run in results.claimed(RUNS):
            tell(run)
            time.sleep(60)

    other, told = other_process(sit_on_the_first, results)
    assert told.get() == RUNS[0]
    results.add(RUNS[3])  # writing frees no claim of another
    assert [run for _, run in results.claimed(RUNS)] == RUNS[1:3]
    other.kill()
    other.join()
    assert [run for _, run in results.claimed(RUNS)] == RUNS[:3]


def test_adding_a_row_keeps_the_claim_on_the_one_at_hand(results):
    claims = results.claimed(RUNS)
    assert next(claims)[1] == RUNS[0]
    results.add(RUNS[2])
    other, told = other_process(lambda theirs, tell: tell([run for _, run in theirs.claimed(RUNS)]), results)
    assert told.get() == [RUNS[1], RUNS[3]]
    other.join()
    claims.close()


def test_processes_that_write_at_once_lose_no_row(results):
    def write(results, tell):
        for number in range(20):
            results.add({"writer": multiprocessing.current_process().pid, "number": number})

    writers = [other_process(write, results)[0] for _ in range(2)]
    for writer in writers:
        writer.join()
    expected = {(writer.pid, number) for writer in writers for number in range(20)}
    assert {(row["writer"], row["number"]) for row in results.rows()} == expected


def test_rows_of_other_weights_or_images_are_not_taken_for_these(results, tmp_path):
    files = [tmp_path / "weights.pt", tmp_path / "images.npz"]
    for file in files:
        file.write_bytes(b"as it was")
    common.Results(results.path, "cpu", files).add(RUNS[0])
    assert common.Results(results.path, "cpu", files).rows()[0].items() >= RUNS[0].items()
    files[1].write_bytes(b"another set")
    with pytest.raises(snows.UsageError, match=r"holds rows of .*give another --out"):
        common.Results(results.path, "cpu", files)
