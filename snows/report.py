"""The former place of `python -m snows.cli.report` (0.2), for one version."""

if __name__ == "__main__":
    import snows.cli.loading  # noqa: F401, for what follows takes seconds
    from snows.cli.report import main
    from snows.cli.shell import shell

    shell(main)
