"""What a benchmark looks at beside time and memory: where the time goes, and the bytes that ranks send."""
