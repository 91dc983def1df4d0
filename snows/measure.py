"""The door to snows/cli/measure.py: `python -m snows.measure RUN_DIR` times a finished run's network."""

if __name__ == "__main__":
    from snows.cli.measure import main
    from snows.cli.shell import shell

    shell(main)
