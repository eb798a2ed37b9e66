"""The objective: named terms, their weights and their settings."""
