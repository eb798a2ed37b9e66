"""What a run learns to do: how its batches go through the models, and how it is evaluated."""
