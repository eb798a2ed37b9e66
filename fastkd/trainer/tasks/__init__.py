"""What differs between classification, detection and embeddings: see ``fastkd.trainer.tasks.base``."""
