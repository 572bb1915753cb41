"""Tasks: a model, its loss and its scores. A task knows no files."""
