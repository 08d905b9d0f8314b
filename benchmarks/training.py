"""`nsp bench training` under its earlier name: `python -m nsp.benchmarks.training`."""

from nsp.benchmarks.verbs import program

if __name__ == "__main__":
    program("training")
