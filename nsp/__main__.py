"""`python -m nsp`: the same program as `nsp`."""

from nsp.cli import main

if __name__ == "__main__":
    main(prog_name="nsp")
