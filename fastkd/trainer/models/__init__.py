"""Models from any source, and where in them the features, feature maps and classifiers are."""
