"""bench/check_moved.py: it finds what the new results files do not hold."""

import check_moved

FORMER = {
    "machine": "two cores",
    "needed": {"fc": {"plain": 7}},
    "rows": [
        {"run": {"pattern": "2:4", "k_step": 0, "biases": False}, "accuracy": 90.25, "layer_seconds": {"fc": 2.5}}
    ],
}
PARTS = [{"network": None, "layer": "fc", "seconds": 2.5}, {"layer": "fc", "plain": 7}]


def lost(**changes):
    row = {"pattern": "2:4", "flags": "--k_step 0 --biases False", "accuracy": 90.25}
    return check_moved.lost(FORMER, [{**row, "environment": {"machine": "two cores"}, **changes}], PARTS, {})


def test_what_stands_in_the_new_files_is_not_lost():
    assert lost() == []


def test_what_does_not_is_told_by_name():
    assert lost(accuracy=90.2) == [("accuracy", 90.25)]
    assert lost(accuracy=None, seconds=90.25) == [("accuracy", 90.25)]
    assert lost(flags="--k_step 4 --biases False") == [("k_step", 0)]
    assert lost(environment={}) == [("machine", "two cores")]
    assert check_moved.lost(FORMER, [], PARTS, {}) == [("rows", 1)]
    assert ("plain", 7) in check_moved.lost({"needed": FORMER["needed"]}, [], PARTS[:1], {})
