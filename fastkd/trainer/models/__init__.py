"""Models of any source, and where their features, maps and classifiers are."""
