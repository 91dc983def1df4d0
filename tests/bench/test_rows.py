"""bench/rows.py: several processes fill one results file, each row once."""

import multiprocessing
import sys
import time

import pytest
from helpers import ROOT

import snows

RUNS = [{"run": {"pattern": "2:4", "way": way}, "seed": seed} for way in ("alone", "SNOWS") for seed in (0, 1)]


@pytest.fixture
def results(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "bench"))
    from rows import Results

    return Results(tmp_path / "table.json", "cpu")


def other_process(work, results):
    """A process that runs work(Results of its own, what it can tell), and where it tells it."""
    fork = multiprocessing.get_context("fork")
    told = fork.SimpleQueue()
    process = fork.Process(target=lambda: work(type(results)(results.path, "cpu"), told.put))
    process.start()
    return process, told


def test_a_row_that_is_held_is_not_measured_again(results):
    results.add({**RUNS[0], "accuracy": 90.0})
    results.add({**RUNS[1], "seed": 7})
    assert results.missing(RUNS) == RUNS[1:]
    assert [position for position, _ in results.claimed(RUNS)] == ["1 of 3", "2 of 3", "3 of 3"]
    assert results.rows()[0]["environment"]["python"] == sys.version.split()[0]


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
    kind, files = type(results), [tmp_path / "weights.pt", tmp_path / "images.npz"]
    for file in files:
        file.write_bytes(b"as it was")
    kind(results.path, "cpu", files).add(RUNS[0])
    assert kind(results.path, "cpu", files).rows()[0].items() >= RUNS[0].items()
    files[1].write_bytes(b"another set")
    with pytest.raises(snows.UsageError, match=r"holds rows of .*give another --out"):
        kind(results.path, "cpu", files)
