"""The former place of `python -m snows.cli.report` (0.2), for one version."""

if __name__ == "__main__":
    from snows.cli.report import main
    from snows.cli.shell import shell

    shell(main)
