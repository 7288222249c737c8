"""`python -m basd`: the same as the `basd` command."""

from basd.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
