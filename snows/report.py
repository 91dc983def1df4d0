"""The former place of `python -m snows.cli.report` (0.2), for one version."""

from snows.cli.report import main

if __name__ == "__main__":
    main()
