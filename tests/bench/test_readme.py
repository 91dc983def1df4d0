"""The README's Python runs as it stands, and its commands take only flags that exist."""

import os
import re
import shlex
import subprocess
import sys

from helpers import ROOT

README = (ROOT / "README.md").read_text()


def test_the_library_snippet_runs_as_it_stands(tmp_path):
    (snippet,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", snippet], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "of all parameters are zero; left dense: {'0': '3 inputs are not a multiple of 4'}" in done.stdout
    assert "name='3', sweep=0" in done.stdout
    assert (tmp_path / "sparse.pt").exists()


def test_the_scripts_know_every_flag_of_the_readmes_commands(script):
    commands = re.findall(r"\(cd (\w+) && python (\w+\.py .*?)\)\n", README, re.DOTALL)
    assert len(commands) == 3
    for folder, command in commands:
        name, *words = shlex.split(command.replace("\\\n", " "))
        help_text = script(f"{folder}/{name}", "--help").out
        assert all(word in help_text for word in words if word.startswith("--"))
