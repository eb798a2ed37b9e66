"""Implementations of the operations: the definition (``reference``) and the streaming ``blocked``."""

from types import ModuleType

from fastkd.backends import blocked

STREAMING: dict[str, ModuleType] = {"blocked": blocked}
BACKENDS = ("reference", *STREAMING)


def resolve(backend: str | None) -> str:
    """The backend to use; ``None`` picks the fastest one that runs on the inputs' device."""
    if backend is None:
        return "blocked"
    if backend not in BACKENDS:
        raise ValueError(f"backend: got {backend!r}, expected None or one of {BACKENDS}")
    return backend
