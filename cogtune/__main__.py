"""``python -m cogtune``: the same program as the ``cogtune`` console script."""

from cogtune.cli import main

if __name__ == "__main__":
    main()
