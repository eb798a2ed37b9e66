"""The losses as functions: they validate, choose a backend, call the operation and take the mean."""
