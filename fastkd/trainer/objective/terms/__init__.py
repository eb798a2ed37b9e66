"""One term per method."""
