"""`nsp bench loader` under its earlier name: `python -m nsp.benchmarks.loader`."""

from nsp.benchmarks.verbs import program

if __name__ == "__main__":
    program("loader")
