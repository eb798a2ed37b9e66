"""Whatever is done to a checkpoint, a resume gives the same result, or CheckpointError in one line.

FASTKD_EXAMPLES=5000 tries more cases than CI does.
"""

import copy
import dataclasses
import json
import math
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from fastkd.trainer import CheckpointError, TrainConfig, train
from fastkd.trainer.commands.reopen import reopen
from fastkd.trainer.ranks import Ranks
from fastkd.trainer.rng import rng_state
from fastkd.trainer.run.distiller import Distiller
from fastkd.trainer.run.meter import Meter
from fastkd.trainer.run.prepare import RunData, build_models, identify, open_data
from fastkd.trainer.run.saved.checkpoint import Checkpoint, read_checkpoint
from fastkd.trainer.run.saved.folder import open_run
from fastkd.trainer.run.state import Identity, Progress, RunState
from fastkd.trainer.run.step import TrainStep
from fastkd.trainer.tasks.base import find_task
from tests.helpers.trainer_runs import one_thread, same, seal, tiny_config  # noqa: F401

EXAMPLES = int(os.environ.get("FASTKD_EXAMPLES", "0"))
CPU = torch.device("cpu")
FILES = ("student.safetensors", "loss.safetensors", "ema.safetensors", "state.pt", "manifest.json")
# Values that no field takes in the place of what it has. Infinities stand in histories.
NEVER: list[Any] = ["x", [], {}, {"a": {}}, [[1]], 10**400, torch.zeros(3), (), b"x"]
NEVER_IN_JSON: list[Any] = [7.5, {"a": 1}, [[1]], 10**400, [None]]


def nested(depth: int) -> Any:
    value: Any = 0
    for _ in range(depth):
        value = [value]
    return value


class Target:
    """A run with a checkpoint in the middle of its second epoch, and what a resume makes of a copy of it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.config = tiny_config(folder, save_every_steps=5, save_every_epochs=0, ema=0.9, keep=20)
        train(self.config)
        self.good = read_checkpoint(folder / "run" / "checkpoints" / "step-00000020")
        self.data: RunData = open_data(self.config, find_task(self.config), None, None, CPU, Ranks())
        self.identity, self.state = self.build()
        self.expected = self.resume(self.copy())
        assert same(self.expected["weights"], self.good.weights)
        assert same(self.expected["state"], {k: v for k, v in self.good.state.items() if k != "loader"})

    def __repr__(self) -> str:
        return "target"

    def build(self) -> tuple[Identity, RunState]:
        built: tuple[Distiller, list[str]] = build_models(
            self.config,
            find_task(self.config),
            self.data,
            CPU,
            Ranks(),
            resumed=True,
            student=None,
            teacher=None,
            terms=None,
        )
        distiller = built[0]
        identity = identify(self.config, self.data, distiller, {"student": None, "teacher": None, "data": None})
        step = TrainStep(distiller, self.config, CPU, Ranks(), find_task(self.config))
        return identity, RunState(distiller, step, Meter(), Progress())

    def copy(self) -> Path:
        """A run folder with a copy of the checkpoint and the records."""
        run = self.folder / "copy"
        shutil.rmtree(run, ignore_errors=True)
        shutil.copytree(self.good.path, run / "checkpoints" / self.good.path.name)
        for name in ("run.json", "metrics.jsonl"):
            shutil.copy(self.folder / "run" / name, run / name)
        return run

    def resume(self, run: Path) -> dict[str, Any]:
        """What a resumed run begins with."""
        config = dataclasses.replace(self.config, run_dir=str(run), resume=True)
        with open_run(config, Ranks()) as opened:
            assert opened.checkpoint is not None
            self.identity.check(opened.checkpoint)
            self.state.restore(opened.checkpoint, config.seed, 0)
        weights = {name: dict(module.state_dict()) for name, module in self.state.modules.items()}
        rest = vars(self.state.saved_state([rng_state(CPU)]))
        return copy.deepcopy({"weights": weights, "state": {k: v for k, v in rest.items() if k != "loader"}})


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Target:
    return Target(tmp_path_factory.mktemp("hostile"))


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path of every part of a nested value."""
    if path:
        yield path
    if isinstance(value, dict | list):
        for key in value if isinstance(value, dict) else range(len(value)):
            if len(path) < 3 or key in (0, 1, "a") or not isinstance(value, list):  # not each of 624 words
                yield from places(value[key], (*path, key))


def part_of(value: Any, path: tuple[Any, ...]) -> Any:
    for key in path:
        value = value[key]
    return value


def put(value: Any, path: tuple[Any, ...], new: Any) -> None:
    part_of(value, path[:-1])[path[-1]] = new


def flip(draw: Callable[..., Any], checkpoint: Path) -> None:
    file = checkpoint / draw(st.sampled_from(FILES))
    content = bytearray(file.read_bytes())
    content[draw(st.integers(0, len(content) - 1))] ^= 1 << draw(st.integers(0, 7))
    file.write_bytes(content)


def resize(draw: Callable[..., Any], checkpoint: Path) -> None:
    file = checkpoint / draw(st.sampled_from(FILES[:4]))
    content = file.read_bytes()
    cut = draw(st.integers(0, len(content) - 1))
    file.write_bytes(content[:cut] if draw(st.booleans()) else content + b"\0" * cut)
    if draw(st.booleans()):
        seal(checkpoint)


def swap(draw: Callable[..., Any], checkpoint: Path) -> None:
    first, second = draw(st.lists(st.sampled_from(FILES[:4]), min_size=2, max_size=2, unique=True))
    if {first, second} == {"student.safetensors", "ema.safetensors"}:
        return  # both are students
    (checkpoint / first).rename(checkpoint / "aside")
    (checkpoint / second).rename(checkpoint / first)
    (checkpoint / "aside").rename(checkpoint / second)
    seal(checkpoint)


def of_another_step(draw: Callable[..., Any], checkpoint: Path, run: Path) -> None:
    step = draw(st.sampled_from(["step-00000005", "step-00000015", "step-00000026"]))
    name = draw(st.sampled_from(FILES))
    shutil.copy(run / "checkpoints" / step / name, checkpoint / name)
    if name == "state.pt":
        seal(checkpoint)


def retype_tensor(draw: Callable[..., Any], checkpoint: Path) -> None:
    file = checkpoint / draw(st.sampled_from(FILES[:3]))
    tensors = load_file(file)
    name = draw(st.sampled_from(sorted(tensors)))
    changes: list[Callable[[torch.Tensor], torch.Tensor]] = [
        lambda x: x.to(torch.float64),
        lambda x: x.to(torch.int8),
        lambda x: x.to(torch.complex64),
        lambda x: torch.cat([x.flatten(), x.flatten()]),
        lambda x: x[None],
        lambda x: x * math.nan if x.is_floating_point() else x.to(torch.int32),
    ]
    change = draw(st.sampled_from([None, *changes]))
    if change is None:
        del tensors[name]
    else:
        tensors[name] = change(tensors[name]).contiguous()
    save_file(tensors, file)
    seal(checkpoint)


def retype_state(draw: Callable[..., Any], checkpoint: Path) -> None:
    state = torch.load(checkpoint / "state.pt", weights_only=True)
    path = draw(st.sampled_from([place for place in places(state) if place[0] != "loader"]))
    old = part_of(state, path)
    new = draw(st.sampled_from([*NEVER, nested(3), nested(400)]))
    if isinstance(old, torch.Tensor):
        flat = old.flatten()
        new = draw(
            st.sampled_from([new, old[None], flat.to(torch.float16), old.to(torch.complex64), flat[:1][:, None]])
        )
    elif isinstance(old, dict | list | str) and type(new) is type(old):
        new = None  # an empty list may be as good as another
    event(f"{path[0]}: {type(old).__name__}")
    put(state, path, new)
    torch.save(state, checkpoint / "state.pt")
    seal(checkpoint)


def remove_from_state(draw: Callable[..., Any], checkpoint: Path) -> None:
    state = torch.load(checkpoint / "state.pt", weights_only=True)
    holders = [(), ("rng",), ("meter",), ("scaler",), ("optimizer",), ("optimizer", "state")]
    holder = draw(st.sampled_from(holders))
    holder = holder if draw(st.booleans()) or holder != ("optimizer", "state") else (*holder, 0)
    names = [name for name in part_of(state, holder) if name != "loader"]
    del part_of(state, holder)[draw(st.sampled_from(names))]
    torch.save(state, checkpoint / "state.pt")
    seal(checkpoint)


def retype_manifest(draw: Callable[..., Any], checkpoint: Path) -> None:
    body = json.loads((checkpoint / "manifest.json").read_text())
    path = draw(st.sampled_from([place for place in places(body) if place[0] != "sha256"]))
    new = draw(st.sampled_from([*NEVER_IN_JSON, nested(40), nested(900)]))
    event(f"manifest: {path[0]}")

    def change(body: dict[str, Any]) -> None:
        if path[0] != "files":
            put(body, path, new)

    seal(checkpoint, change)
    if path[0] == "files":  # which sealing would put right
        body = json.loads((checkpoint / "manifest.json").read_text())
        put(body, path, new)
        (checkpoint / "manifest.json").write_text(json.dumps(body))


MUTATIONS = (flip, resize, swap, retype_tensor, retype_state, remove_from_state, retype_manifest)


@settings(
    max_examples=EXAMPLES or 80,
    deadline=None,
    database=None,
    derandomize=not EXAMPLES,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(data=st.data())
def test_a_changed_checkpoint_gives_the_same_run_or_a_checkpoint_error(target: Target, data: st.DataObject) -> None:
    run = target.copy()
    checkpoint = run / "checkpoints" / target.good.path.name
    mutate = data.draw(st.sampled_from([*MUTATIONS, of_another_step]))
    if mutate is of_another_step:
        of_another_step(data.draw, checkpoint, target.folder / "run")
    else:
        mutate(data.draw, checkpoint)  # type: ignore[operator]
    found, refusal = outcome(lambda: target.resume(run))
    event(f"{mutate.__name__}: {'refused' if refusal else 'the same'}")
    assert (not refusal and same(found, target.expected)) or "checkpoints/step-00000020" in refusal
    model, refusal = outcome(lambda: reopen(run, with_data=False, trust_code=True).model)
    assert refusal or same(dict(model.state_dict()), target.good.weights["ema.safetensors"])


def outcome(call: Callable[[], Any]) -> tuple[Any, str]:
    """What ``call`` returns, or the one line of its CheckpointError."""
    try:
        return call(), ""
    except CheckpointError as error:
        line = str(error)
    assert "\n" not in line
    assert len(line) < 2000
    return None, line


def changed_state(run: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    file = next(run.glob("checkpoints/*/state.pt"))
    state = torch.load(file, weights_only=True)
    change(state)
    torch.save(state, file)
    seal(file.parent)


@pytest.mark.parametrize(
    ("path", "value", "told"),
    [
        (("optimizer", "state", 0, "momentum_buffer"), torch.zeros(1), r"optimizer\.momentum_buffer: got .*\[1\]"),
        (("optimizer", "state", 0, "momentum_buffer"), torch.full((12, 16), torch.nan), "is NaN for parameter 0"),
        (("optimizer", "param_groups", 0, "momentum"), 99.0, r"optimizer\.momentum: got 99\.0, expected 0\.9"),
        (("optimizer", "param_groups", 0, "weight_decay"), -1000.0, r"optimizer\.weight_decay: got -1000\.0"),
        (("optimizer", "param_groups", 0, "lr"), "fast", r"optimizer\.lr: got 'fast'"),
        (("optimizer", "param_groups", 0, "lr"), math.inf, r"optimizer\.lr: got inf"),
        (("scaler", "scale"), -1.0, r"scaler\.scale: got -1\.0"),
        (("step",), 10**9, r"step is 1000000000, 20 in manifest\.json"),
        (("epoch",), 2, r"epoch is 2, 1 in manifest\.json"),
        (("seconds",), math.nan, "seconds: got nan"),
        (("history",), [], "history has 0 records, expected one for each epoch"),
        (("metrics_bytes",), "12", "metrics_bytes is of type str, expected int"),
        (("rng", "numpy"), ["MT19937", torch.zeros(624, dtype=torch.int64), 10**6, 0, 0.0], r"rng\.numpy: got 1000000"),
        (("rng", "torch"), torch.zeros(3, dtype=torch.uint8), "is not a training state"),
        (("meter", "sums", "loss"), "0", r"meter\.sums\.loss: got '0'"),
    ],
)
def test_tampered_training_states_are_refused_by_name(
    target: Target, path: tuple[Any, ...], value: Any, told: str
) -> None:
    run = target.copy()
    changed_state(run, lambda state: put(state, path, value))
    with pytest.raises(CheckpointError, match=rf"step-00000020/state\.pt: .*{told}") as caught:
        target.resume(run)
    assert "\n" not in str(caught.value)


def test_a_checkpoint_under_another_steps_name_is_not_the_newest(target: Target) -> None:
    run = target.copy()
    (run / "checkpoints" / "step-00000020").rename(run / "checkpoints" / "step-00000999")
    with pytest.raises(CheckpointError, match=r"step-00000999: is the checkpoint of step 20 under another name"):
        target.resume(run)


@pytest.mark.parametrize("name", ["lars", "lamb", "adamw"])
def test_moments_of_every_optimiser_are_checked_and_restored(tmp_path: Path, name: Any) -> None:
    config = tiny_config(tmp_path, teacher=None, epochs=1, save_every_steps=5)
    config = dataclasses.replace(config, objective=dataclasses.replace(config.objective, terms="ce"))
    config = dataclasses.replace(config, optim=dataclasses.replace(config.optim, name=name))
    train(config)
    good: Checkpoint = read_checkpoint(tmp_path / "run" / "checkpoints" / "step-00000010")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-00000013")
    again: TrainConfig = dataclasses.replace(config, resume=True)
    for moment in good.state["optimizer"]["state"][0]:
        run = shutil.copytree(tmp_path / "run", tmp_path / moment)
        shutil.rmtree(run / "checkpoints" / "step-00000005", ignore_errors=True)
        changed_state(
            run, lambda state, moment=moment: put(state, ("optimizer", "state", 0, moment), torch.zeros(2, 2))
        )
        with pytest.raises(CheckpointError, match=rf"state\.pt: .*optimizer\.{moment}: got "):
            train(dataclasses.replace(again, run_dir=str(run)))
    assert train(again).resumed_from == 10
