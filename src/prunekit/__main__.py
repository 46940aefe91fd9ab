"""Entry point of `python -m prunekit`, the same as `prunekit`."""

from prunekit.cli import main

if __name__ == "__main__":
    main()
