"""What watches a run: callbacks of your own, TensorBoard, and the trackers Weights & Biases and MLflow."""

from __future__ import annotations

import importlib
import importlib.util
import itertools
import os
import re
from pathlib import Path
from typing import Any, Literal

from fastkd.trainer.text import flatten

TENSORBOARD = "tensorboard"
Outcome = Literal["finished", "stopped", "failed"]


class Callback:
    """Watches a run. Override the methods you need, and give an object to ``train``::

        class Mail(Callback):
            def on_record(self, kind, step, values):
                if kind == "epoch" and values.get("accuracy", 0) > 0.9:
                    send_mail(f"0.9 is passed at step {step}")

        train(config, callbacks=[Mail()])

    Only rank 0 calls it. A run that was already finished calls nothing. A callback that raises ends the run and loses
    nothing: the step or epoch in which it raised is completed and saved, and all callbacks are told of the end. Then
    the exception is raised on every rank. The saved run can be resumed.
    """

    def on_start(self, info: dict[str, Any], folder: Path | None, step: int) -> None:
        """Called before the first step. ``info`` is the content of ``run.json``, ``folder`` the run folder.

        ``step`` is how many steps are done, which is more than 0 in a resumed run.
        """

    def on_record(self, kind: str, step: int, values: dict[str, float]) -> None:
        """Called with every record.

        ``kind`` is ``step`` (every ``log_every`` steps), ``epoch`` (its means, and the evaluation if there was one), or
        ``speed`` (once per epoch). ``values`` may hold NaN. A resumed run records again what followed its checkpoint.
        """

    def on_end(self, outcome: Outcome, checkpoint: Path | None) -> None:
        """Called once, after the last checkpoint was written.

        ``outcome`` is ``stopped`` after a signal and ``failed`` after an exception; both can be resumed from
        ``checkpoint``.
        """


class TensorBoard(Callback):
    """Scalars ``kind/name`` in the folder ``tensorboard`` of the run."""

    def __init__(self) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._open = SummaryWriter
        self._board: SummaryWriter | None = None

    def on_start(self, info: dict[str, Any], folder: Path | None, step: int) -> None:
        self._board = self._open(str(folder / TENSORBOARD), purge_step=step + 1) if folder is not None else None

    def on_record(self, kind: str, step: int, values: dict[str, float]) -> None:
        if self._board is not None:
            for name, value in values.items():
                self._board.add_scalar(f"{kind}/{name}", value, step)

    def on_end(self, outcome: Outcome, checkpoint: Path | None) -> None:
        if self._board is not None:
            self._board.close()


class WandB(Callback):
    """Weights & Biases. WANDB_PROJECT (default ``fastkd``), WANDB_MODE=offline and its other variables apply."""

    def __init__(self) -> None:
        self._wandb = _imported("wandb")

    def on_start(self, info: dict[str, Any], folder: Path | None, step: int) -> None:
        self._run = self._wandb.init(
            project=os.environ.get("WANDB_PROJECT", "fastkd"),
            name=info["config"]["run_dir"],
            config=info,
            dir=None if folder is None else str(folder),
            id=_known_id("wandb", folder),
            resume="allow",
        )
        _keep_id("wandb", folder, self._run.id)
        # The step is an axis of its own: a resumed run goes back to its checkpoint, which wandb's own step cannot.
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def on_record(self, kind: str, step: int, values: dict[str, float]) -> None:
        self._run.log({"step": step, **{f"{kind}/{name}": value for name, value in values.items()}})

    def on_end(self, outcome: Outcome, checkpoint: Path | None) -> None:
        self._run.finish(exit_code=0 if outcome == "finished" else 1)


class MLflow(Callback):
    """MLflow. MLFLOW_TRACKING_URI, MLFLOW_EXPERIMENT_NAME and its other variables say where the run goes."""

    def __init__(self) -> None:
        self._mlflow = _imported("mlflow")

    def on_start(self, info: dict[str, Any], folder: Path | None, step: int) -> None:
        known = _known_id("mlflow", folder)
        nested = self._mlflow.active_run() is not None  # the run of a program that calls train
        run = self._mlflow.start_run(run_id=known, run_name=info["config"]["run_dir"], nested=nested)
        _keep_id("mlflow", folder, run.info.run_id)
        if known is None:  # a parameter of a run cannot be changed later
            settings = iter(flatten(info["config"]).items())
            while hundred := dict(itertools.islice(settings, 100)):  # the most that MLflow takes at once
                self._mlflow.log_params(hundred)
        self._mlflow.log_dict(info, "run.json")

    def on_record(self, kind: str, step: int, values: dict[str, float]) -> None:
        plain = {re.sub(r"[^\w\-. /]", "_", f"{kind}/{name}"): float(value) for name, value in values.items()}
        self._mlflow.log_metrics(plain, step=step)

    def on_end(self, outcome: Outcome, checkpoint: Path | None) -> None:
        self._mlflow.end_run({"finished": "FINISHED", "stopped": "KILLED", "failed": "FAILED"}[outcome])


TRACKERS = {"wandb": WandB, "mlflow": MLflow}


def built_in(tensorboard: bool, track: str | None) -> list[Callback]:
    """The callbacks that a config asks for. TensorBoard is left out where it is not installed.

    ValueError when the tracker is not installed.
    """
    boards = [TensorBoard()] if tensorboard and importlib.util.find_spec("tensorboard") is not None else []
    return [*boards, *([TRACKERS[track]()] if track is not None else [])]


def _imported(package: str) -> Any:
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise ValueError(
            f"track: got {package!r}, expected it to be installed ({error}); run: pip install {package}"
        ) from None


def _known_id(tracker: str, folder: Path | None) -> str | None:
    """The tracker's own name for the run of this folder, with which a resumed run goes on in the same place."""
    if folder is None or not (folder / f"{tracker}.id").is_file():
        return None
    return (folder / f"{tracker}.id").read_text()


def _keep_id(tracker: str, folder: Path | None, name: str) -> None:
    if folder is not None and not (folder / f"{tracker}.id").is_file():
        with (folder / f"{tracker}.id").open("x") as file:
            file.write(name)
