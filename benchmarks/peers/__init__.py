"""Other ways to run a model, as backends or programs beside the engines."""
