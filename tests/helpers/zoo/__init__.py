"""Case files of the classical losses, run by this package. See ``__main__.py``."""
