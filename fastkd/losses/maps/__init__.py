"""Losses that read feature maps, and the layers that bring a student's map to a teacher's."""
