"""Training data: patches and splits, the prepared container, and the commands that fill it."""
