"""Where a job's features lie: they come back as they were, room is kept to, and nothing is left behind."""

import os
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers import ROOT
from hypothesis import given
from hypothesis import strategies as st

from snows.calibration import store as stores
from snows.calibration.staging import Staging, extent, nbytes
from snows.calibration.store import Store, is_in_memory, remove_left_over, room_for
from snows.calibration.stream import Stream
from snows.errors import WriteError
from snows.network.network import Network

LAYOUTS = {
    "contiguous": lambda: torch.randn(3, 4, 5),
    "channels last": lambda: torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
    "a view with gaps": lambda: torch.randn(4, 9, dtype=torch.float64)[:, 3:6],
    "transposed": lambda: torch.randn(4, 5).T,
    "expanded": lambda: torch.randn(1, 4).expand(5, 4),
    "no numbers": lambda: torch.zeros(0, 3),
    "one number": lambda: torch.tensor(3.0),
    "booleans": lambda: torch.rand(7) < 0.5,
    "half": lambda: torch.randn(3, 3).to(torch.bfloat16),
}


def same(ours, reference):
    assert ours.equal(reference)
    assert (ours.dtype, ours.stride()) == (reference.dtype, reference.stride())


@pytest.mark.parametrize("place", ["host", "files"])
def test_values_come_back_as_they_were(place, tmp_path):
    values = {name: make() for name, make in LAYOUTS.items()} | {"a tuple": (torch.ones(2), 7), "a number": 5}
    store = Store("cpu", host_bytes=2**20 if place == "host" else 0, cache_dir=str(tmp_path))
    held = store.put(values)
    assert store.held[place] == nbytes(values) > 0
    found = held.get()
    assert found.keys() == values.keys()
    for name in LAYOUTS:
        same(found[name], values[name])
    assert found["a tuple"][0].equal(values["a tuple"][0])
    assert (found["a tuple"][1], found["a number"]) == (7, 5)
    assert held.get({"half", "a number"}).keys() == {"half", "a number"}


@given(st.lists(st.integers(0, 40), max_size=12), st.integers(0, 100))
def test_room_is_kept_to_and_given_back(sizes, room):
    store, helds, kept = Store("cpu", host_bytes=room), [], []
    for size in sizes:
        helds.append(store.put({"x": torch.zeros(size, dtype=torch.uint8)}, files=False))
        kept = [held for held in helds if held is not None]
        assert store.held["host"] == sum(extent(held.get()["x"]) for held in kept) <= room
        assert helds[-1] is not None or store.held["host"] + size > room
    del kept
    helds.clear()
    assert store.held == {"device": 0, "host": 0, "files": 0}
    assert store.most["host"] <= room


def test_files_go_with_what_they_hold_and_the_folder_with_the_store(tmp_path):
    store = Store("cpu", host_bytes=0, cache_dir=str(tmp_path))
    held = store.put({"x": torch.arange(10)})
    folder = store.folder
    assert len(os.listdir(folder)) == 1
    read = held.get()["x"]
    del held
    assert os.listdir(folder) == []
    assert read.equal(torch.arange(10))  # what has been read stays
    del store, read
    assert os.listdir(tmp_path) == []


def test_what_a_killed_run_left_is_removed_by_the_next_and_a_living_run_is_left_alone(tmp_path):
    program = f"""
import os, signal, torch
from snows.calibration.store import Store
store = Store("cpu", host_bytes=0, cache_dir={str(tmp_path)!r})
held = store.put({{"x": torch.arange(10)}})
os.kill(os.getpid(), signal.SIGKILL)
"""
    assert subprocess.run([sys.executable, "-c", program], cwd=ROOT).returncode == -9
    (left,) = os.listdir(tmp_path)
    living = Store("cpu", host_bytes=0, cache_dir=str(tmp_path))
    held = living.put({"x": torch.arange(3)})
    assert left not in os.listdir(tmp_path)
    other = Store("cpu", host_bytes=0, cache_dir=str(tmp_path))
    other.put({"x": torch.arange(3)})
    assert held.get()["x"].equal(torch.arange(3))


def test_a_folder_that_another_run_takes_for_left_over_before_it_is_locked_is_replaced(tmp_path, monkeypatch):
    made, mkdtemp = [], tempfile.mkdtemp

    def raced(**how):
        made.append(mkdtemp(**how))
        if len(made) == 1:
            remove_left_over(tmp_path)  # another process, just now
        return made[-1]

    monkeypatch.setattr(tempfile, "mkdtemp", raced)
    store = Store("cpu", host_bytes=0, cache_dir=str(tmp_path))
    held = store.put({"x": torch.arange(10)})
    assert held.get()["x"].equal(torch.arange(10))
    assert os.listdir(tmp_path) == [store.folder.name]
    assert len(made) == 2


def test_a_file_of_images_that_was_left_is_removed_too(tmp_path):
    (tmp_path / "snows-scratch-left").write_bytes(b"images")
    remove_left_over(tmp_path)
    assert os.listdir(tmp_path) == []


def test_a_full_disk_and_a_folder_that_cannot_be_written_end_in_one_line(tmp_path, monkeypatch):
    def full(*args):
        raise OSError(28, "No space left on device")

    store = Store("cpu", host_bytes=0, cache_dir=str(tmp_path))
    with monkeypatch.context() as patched:
        patched.setattr(stores, "laid_flat", full)
        with pytest.raises(WriteError, match=r"No space left on device.*`cache_dir`"):
            store.put({"x": torch.arange(10)})
    assert os.listdir(store.folder) == []
    (tmp_path / "file").write_text("")
    with pytest.raises(WriteError, match="`cache_dir`"):
        Store("cpu", host_bytes=0, cache_dir=str(tmp_path / "file")).put({"x": torch.arange(10)})


def test_a_folder_in_memory_is_known_by_its_file_system(tmp_path):
    mounts = tmp_path / "mounts"
    mounts.write_text(f"/dev/sda / ext4 rw 0 0\ntmpfs {tmp_path} tmpfs rw 0 0\n/dev/sdb {tmp_path}/disk ext4 rw 0 0\n")
    (tmp_path / "disk").mkdir()
    assert is_in_memory(tmp_path, mounts)
    assert not is_in_memory(tmp_path / "disk", mounts)
    assert not is_in_memory(tmp_path.parent, mounts)


def test_many_images_lie_in_a_file_without_a_name(tmp_path, monkeypatch):
    monkeypatch.setattr(stores, "LARGE", 1000)
    large = room_for(torch.Size((5, 3, 10, 10)), torch.float32, str(tmp_path / "new"))
    large[:] = torch.arange(1500.0).view(5, 3, 10, 10)
    assert large.sum() == 1499 * 750
    assert os.listdir(tmp_path / "new") == []
    maps = Path("/proc/self/maps").read_text().splitlines()
    assert "(deleted)" in next(line for line in maps if str(tmp_path) in line)
    small = room_for(torch.Size((2, 3)), torch.float64, str(tmp_path / "none"))
    assert small.shape == (2, 3)
    assert not (tmp_path / "none").exists()
    (tmp_path / "file").write_text("")
    with pytest.raises(WriteError, match="`cache_dir`"):
        room_for(torch.Size((1000,)), torch.float32, str(tmp_path / "file"))


class Event:
    """Of a GPU that is not there: what was asked of it, in order."""

    def __init__(self, log):
        self.log = log

    def __getattr__(self, name):
        return lambda *args: self.log.append(name)


@pytest.fixture
def staging(monkeypatch):
    """Copies by way of the pinned buffer, with the host for the device."""
    log = []
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: Event(log))
    monkeypatch.setattr(torch.cuda, "Event", lambda: Event(log))
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: monkeypatch.context())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Event(log))
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda tensor, stream: log.append("record_stream"))
    return SimpleNamespace(copies=Staging(torch.device("cpu")), log=log)


def test_what_is_expected_is_uploaded_once_and_what_is_not_asked_for_is_forgotten(staging, tiny, images):
    """Two streams in turn, as an objective reads them whose targets are computed again."""
    store, network = Store("cpu"), Network(tiny)
    store.on_host, store.staging, begun = False, staging.copies, []
    upload = staging.copies.upload
    staging.copies.upload = lambda values: begun.append(1) or upload(values)
    streams = [Stream(network, network.model, list(images.split(1)), "cpu", store) for _ in range(2)]
    for stream in streams:
        stream.advance(network.layers[1].node)
    begun.clear()
    for i in range(5):
        for stream in streams:
            stream.read(i)
            stream.expect(i + 1)
    assert len(begun) == 10
    assert all(held.pending is None for stream in streams for held in stream.held)
    streams[0].expect(2)
    streams[0].expect(3)
    assert [held.pending is not None for held in streams[0].held] == [False, False, False, True, False]


def test_copies_by_way_of_the_buffer_are_exact_and_wait_for_it(staging):
    values = {name: make() for name, make in LAYOUTS.items()}
    first = staging.copies.upload(values)
    assert "synchronize" not in staging.log
    second = staging.copies.upload({"x": torch.ones(3)})  # into the same buffer, once it is free
    assert "synchronize" in staging.log
    for name, tensor in first.result().items():
        same(tensor, values[name])
    assert second.result()["x"].equal(torch.ones(3))
    assert staging.log.count("wait_event") == 2
    for name, tensor in staging.copies.download(values).items():
        same(tensor, values[name])
