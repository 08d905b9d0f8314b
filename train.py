"""`python train.py`: train a model; without arguments, the demo model on the embedded emoji set."""

from nsp.console.train_command import main

__all__ = ["main"]

if __name__ == "__main__":
    main()
