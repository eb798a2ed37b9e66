"""What a run writes into its folder and reads from it: checkpoints, records, settings."""
