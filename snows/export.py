"""The command python -m snows.export: files for runtimes from a finished run (snows/cli/exporting.py)."""

if __name__ == "__main__":
    from snows.cli.exporting import main
    from snows.cli.shell import shell

    shell(main)
