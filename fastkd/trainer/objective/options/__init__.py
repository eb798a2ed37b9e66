"""The options of the terms: one dataclass per method."""
