"""`python -m nsp.console.curves` under its earlier name."""

from nsp.console.curves import main

if __name__ == "__main__":
    main()
