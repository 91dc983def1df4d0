"""The former place of `load` (0.2), for one version: use `snows.load_run`."""

from snows.cli.run_folder import load

__all__ = ["load"]
