"""The flags of the demo, which is a part of the study ``digits``: see ``fastkd.study.studies.digits``."""

from dataclasses import dataclass
from pathlib import Path

from fastkd.study.studies.digits import DEMO_METHODS, DigitsOptions, objective_of
from fastkd.validate import check_int


@dataclass(kw_only=True, frozen=True)
class DemoConfig:
    """Train a teacher and students on scikit-learn's digits; print a table and write a report."""

    seeds: int = 10
    """Students per method."""
    epochs: int = 34
    """Passes of a student over all training images; the student from scratch takes as many steps."""
    teacher_epochs: int = 30
    """Epochs of the teacher."""
    methods: tuple[str, ...] = DEMO_METHODS
    """Objectives as the trainer writes them; "ce" is the student from scratch, "dcd-e" is DCD with its scale at e."""
    workers: int | None = None
    """Processes of one thread each. By default one per core, at most four."""
    out: Path = Path("runs/demo")
    """Folder in which every run of the demo makes a new folder."""

    def __post_init__(self) -> None:
        for name in ("seeds", "epochs", "teacher_epochs"):
            check_int(name, getattr(self, name), 1)
        if self.workers is not None:
            check_int("workers", self.workers, 1)
        if not self.methods or len(set(self.methods)) != len(self.methods):
            raise ValueError(f"methods: got {self.methods}, expected at least one, each once")
        for method in self.methods:
            objective_of(method)

    def options(self, folder: Path) -> DigitsOptions:
        """The study ``digits`` with these settings, in ``folder``."""
        return DigitsOptions(
            seeds=self.seeds,
            epochs=self.epochs,
            teacher_epochs=self.teacher_epochs,
            methods=self.methods,
            workers=self.workers,
            out=folder,
        )
