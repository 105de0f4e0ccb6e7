"""`python -m chatkore_async.cli`, for where the script `chatkore` is not on the path."""

from chatkore_async.cli import main

if __name__ == "__main__":  # pragma: no branch
    main()
