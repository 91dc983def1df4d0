"""The engine and the scripts on a device that is not the CPU; see tests/jobs/pretend_device.py."""

import subprocess
import sys

from helpers import ROOT


def test_everything_runs_on_a_device_of_its_own():
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/jobs/pretend_device.py"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
