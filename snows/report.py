"""The door to snows/cli/report.py: `python -m snows.report RUN_DIR ...` draws and compares finished runs."""

if __name__ == "__main__":
    from snows.cli.report import main
    from snows.cli.shell import shell

    shell(main)
