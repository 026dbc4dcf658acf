"""The commands as functions: a verb each, and the directory that a run fills."""
