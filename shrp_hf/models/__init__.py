"""The models: everything that a saved model needs to run, and nothing else, so that the Hub can carry these files."""
