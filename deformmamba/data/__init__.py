"""Training data: patches, splits, and the format and preparation of data sets on disk."""
