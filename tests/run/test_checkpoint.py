"""Checkpoints and weights files: damage is named, mismatch is named, nothing in a file is ever executed."""

import dataclasses
import os
import pickle
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from fastkd.trainer import CheckpointError, evaluate_checkpoint, load_weights, train
from fastkd.trainer.models.weights import save_tensors
from fastkd.trainer.run.saved.checkpoint import LOSS, STUDENT, CheckpointFolder, find_checkpoint, read_checkpoint
from tests.helpers.trainer_runs import DropoutNet, seal, tiny_config

FILES = ("student.safetensors", "loss.safetensors", "state.pt", "manifest.json")
OURS = {"name": "fastkd.trainer.models.small:MLP"}
PARTS = {FILES[0]: nn.Linear(2, 2), FILES[1]: nn.Linear(1, 1)}


class Payload:
    """A pickle that creates a file when it is loaded."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)

    def __reduce__(self):
        return (open, (self.path, "w"))


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    config = tiny_config(tmp_path_factory.mktemp("finished"), epochs=1)
    return config, train(config)


@pytest.fixture
def checkpoint(finished, tmp_path) -> Path:
    """A copy of a good checkpoint, to be damaged."""
    return Path(shutil.copytree(finished[1].path, tmp_path / "step-00000013"))


def test_a_checkpoint_holds_student_heads_tau_and_state(finished):
    config, result = finished
    read = read_checkpoint(result.path)
    assert read.weights[STUDENT].keys() == DropoutNet().state_dict().keys()
    assert torch.equal(read.weights[LOSS]["terms.dcd.loss.tau"], result.distiller.objective.terms["dcd"].loss.tau)
    assert {"terms.dcd.loss.student_head.weight", "terms.dcd.loss.teacher_head.bias"} <= read.weights[LOSS].keys()
    assert read.manifest["step"] == read.state["step"] == 13
    assert read.manifest["config"] == config.to_dict()
    assert result.path.name == "step-00000013"


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", ["truncated", "flipped", "missing", "empty"])
def test_damage_to_any_file_is_an_error_that_names_it(checkpoint, name, damage):
    file = checkpoint / name
    content = bytearray(file.read_bytes())
    if damage == "truncated":
        file.write_bytes(content[: len(content) // 2])
    elif damage == "flipped":
        content[len(content) // 2] ^= 1
        file.write_bytes(content)
    elif damage == "missing":
        file.unlink()
    else:
        file.write_bytes(b"")
    words = {"truncated": "truncated|corrupted", "flipped": "corrupted", "missing": "missing", "empty": "truncated"}
    with pytest.raises(CheckpointError, match=rf"{name}: .*({words[damage]})"):
        read_checkpoint(checkpoint)
    with pytest.raises(CheckpointError, match=name):
        evaluate_checkpoint(checkpoint, trust_code=True)


def test_a_manifest_that_was_edited_is_an_error(checkpoint):
    file = checkpoint / "manifest.json"
    file.write_text(file.read_text().replace('"step": 13', '"step": 12'))
    with pytest.raises(CheckpointError, match=r"manifest\.json: is corrupted, its sha256 differs"):
        read_checkpoint(checkpoint)


@pytest.mark.parametrize(
    "key", ["step", "config", "train_samples", "labels_sha256", "teacher_sha256", "given_as_objects"]
)
def test_a_manifest_that_lacks_a_key_is_an_error(finished, tmp_path, key):
    run = Path(shutil.copytree(finished[0].run_dir, tmp_path / "run"))
    seal(find_checkpoint(run), lambda body: body.pop(key))
    config = dataclasses.replace(finished[0], run_dir=str(run), resume=True)
    with pytest.raises(CheckpointError, match=rf"manifest\.json: lacks {key}"):
        train(config)
    if key in ("step", "config"):
        with pytest.raises(CheckpointError, match=rf"manifest\.json: lacks {key}"):
            evaluate_checkpoint(run, trust_code=True)


@pytest.mark.parametrize(
    "key", [("step",), ("metrics_bytes",), ("rng",), ("rng", "numpy"), ("optimizer", "param_groups"), ("meter", "sums")]
)
def test_a_state_that_lacks_a_key_is_an_error(finished, tmp_path, key):
    run = Path(shutil.copytree(finished[0].run_dir, tmp_path / "run"))
    file = find_checkpoint(run) / "state.pt"
    state = torch.load(file, weights_only=True)
    part = state
    for name in key[:-1]:
        part = part[name]
    del part[key[-1]]
    torch.save(state, file)
    seal(file.parent)
    with pytest.raises(CheckpointError, match=rf"state\.pt: .*{key[-1]}"):
        train(dataclasses.replace(finished[0], run_dir=str(run), resume=True))


def test_resume_from_a_damaged_checkpoint_raises_and_keeps_the_run(finished, tmp_path):
    config, _ = finished
    shutil.copytree(config.run_dir, tmp_path / "run")
    config = dataclasses.replace(config, run_dir=str(tmp_path / "run"), resume=True)
    state = find_checkpoint(config.run_dir) / "state.pt"
    state.write_bytes(state.read_bytes()[:-100])
    metrics = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    with pytest.raises(CheckpointError, match=r"state\.pt: is truncated.*; remove .*step-0+13 to resume from step-0+$"):
        train(config)
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == metrics


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_code_in_the_training_state_is_not_executed(checkpoint, tmp_path, protocol):
    ran = tmp_path / "ran"
    for write in (
        lambda: torch.save({"step": Payload(ran)}, checkpoint / "state.pt", pickle_protocol=max(protocol, 2)),
        lambda: (checkpoint / "state.pt").write_bytes(pickle.dumps(Payload(ran), protocol=protocol)),
    ):
        write()
        seal(checkpoint)
        with pytest.raises(CheckpointError, match=r"state\.pt: cannot be read") as caught:
            read_checkpoint(checkpoint)
        assert not re.search("weights_only|allowlist|trust", str(caught.value))
        with pytest.raises(CheckpointError, match=r"state\.pt: cannot be read"):
            evaluate_checkpoint(checkpoint, trust_code=True)
        assert not ran.exists()
    pickle.loads(pickle.dumps(Payload(ran)))
    assert ran.exists()  # the payload does work where pickles are trusted


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("name", ["teacher.pt", "teacher.pth", "teacher.bin", "teacher.safetensors", "teacher"])
def test_code_in_a_weights_file_is_not_executed(tmp_path, name):
    ran = tmp_path / "ran"
    torch.save({"state_dict": {"weight": Payload(ran)}}, tmp_path / name)
    with pytest.raises(CheckpointError, match=name):
        load_weights(tmp_path / name)
    (tmp_path / name).write_bytes(pickle.dumps(Payload(ran)))
    config = tiny_config(tmp_path)
    config = dataclasses.replace(config, teacher=dataclasses.replace(config.teacher, weights=str(tmp_path / name)))
    with pytest.raises(CheckpointError, match=name):
        train(config)
    assert not ran.exists()


def test_a_forged_config_imports_nothing_without_trust(checkpoint, tmp_path, monkeypatch):
    (tmp_path / "forged.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\ndef build(**options): ...\n")
    monkeypatch.syspath_prepend(tmp_path)
    for part in ("student", "data"):
        seal(checkpoint, lambda body: body["config"]["student"].update(name="fastkd.trainer.models.small:MLP"))
        seal(checkpoint, lambda body, part=part: body["config"][part].update(name="forged:build"))
        with pytest.raises(CheckpointError, match=r"would import and call 'forged:build'"):
            evaluate_checkpoint(checkpoint)
        assert not (tmp_path / "ran").exists()
    with pytest.raises((CheckpointError, TypeError)):
        evaluate_checkpoint(checkpoint, trust_code=True)
    assert (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "name",
    [
        "fastkd.trainer.models.small:nn.functional.torch.os.system",
        "fastkd.trainer.models.small:nn.Module",
        "fastkd.trainer.models.small:nn",
        "fastkd.trainer.models.small:Tensor",
        "fastkd.trainer.models.small:SmallConvNet.mro",
        "fastkd.trainer.models.small:__import__",
        "fastkd.trainer.models.small:itertools",
        "fastkd.trainer:nets.SmallConvNet",
        "fastkd.trainer.nets:nn.functional.torch.os.system",
        "fastkd.trainer.nets:nn.Module",
    ],
)
@pytest.mark.parametrize("part", ["student", "data"])
def test_a_forged_config_reaches_nothing_through_our_own_module(checkpoint, tmp_path, name, part):
    ran = tmp_path / "ran"
    forged = {"name": name, "options": {"command": f"touch {ran}"}}
    seal(checkpoint, lambda body: body["config"].update({"student": OURS, part: forged}))
    with pytest.raises(CheckpointError, match=f"would import and call '{name}'"):
        evaluate_checkpoint(checkpoint)
    assert not ran.exists()


def test_weights_come_from_safetensors_state_dicts_checkpoints_and_run_folders(finished, tmp_path):
    config, result = finished
    expected = result.distiller.student.model.state_dict()
    save_file(dict(expected), tmp_path / "w.safetensors")
    torch.save(expected, tmp_path / "w.pt")
    torch.save({"epoch": 3, "state_dict": expected}, tmp_path / "nested.pth")
    for source in (tmp_path / "w.safetensors", tmp_path / "w.pt", tmp_path / "nested.pth", result.path, config.run_dir):
        found = load_weights(source)
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_weights_that_are_missing_or_do_not_fit_raise_with_names(tmp_path):
    config = tiny_config(tmp_path)

    def with_weights(path: Path):
        return dataclasses.replace(config, teacher=dataclasses.replace(config.teacher, weights=str(path)))

    with pytest.raises(CheckpointError, match=r"nothing\.pt: no such weights file"):
        train(with_weights(tmp_path / "nothing.pt"))
    save_file(DropoutNet(width=10).state_dict(), tmp_path / "other.safetensors")
    with pytest.raises(
        CheckpointError, match=r"other\.safetensors.*7 of .* shape \(body\.1\.weight: \(10, 16\) in .*, \(24, 16\)"
    ):
        train(with_weights(tmp_path / "other.safetensors"))
    partial = DropoutNet(width=24).state_dict()
    partial["head.weight"] = partial.pop("fc.weight")
    torch.save(partial, tmp_path / "renamed.pt")
    with pytest.raises(CheckpointError, match=r"renamed\.pt.*1 missing \(fc\.weight\); 1 unexpected \(head\.weight\)"):
        train(with_weights(tmp_path / "renamed.pt"))
    torch.save([1, 2], tmp_path / "list.pt")
    with pytest.raises(CheckpointError, match=r"list\.pt: holds no state dict"):
        train(with_weights(tmp_path / "list.pt"))
    assert not Path(config.run_dir, "metrics.jsonl").exists()


def test_evaluation_rebuilds_the_model_from_the_checkpoint(finished):
    config, result = finished
    found = evaluate_checkpoint(config.run_dir, trust_code=True)
    assert found.accuracy == result.accuracy
    assert found.loss == result.history[-1]["eval_loss"]
    assert found.step == 13
    assert found.samples == 20


def test_evaluation_of_another_architecture_raises(finished):
    with pytest.raises(CheckpointError, match=r"student\.safetensors.*body\.1\.weight"):
        evaluate_checkpoint(finished[1].path, model=DropoutNet(width=5), trust_code=True)


def test_missing_checkpoints_raise(tmp_path):
    with pytest.raises(CheckpointError, match=r"absent: no such checkpoint"):
        evaluate_checkpoint(tmp_path / "absent")
    with pytest.raises(CheckpointError, match="holds no checkpoint"):
        evaluate_checkpoint(tmp_path)


def test_the_last_k_are_kept_and_the_old_one_goes_only_after_the_new_one_is_there(tmp_path, monkeypatch):
    folder = CheckpointFolder(tmp_path, keep=2)
    seen = []
    removed = shutil.rmtree

    def watch(path, *args, **kwargs):
        seen.append(sorted(p.name for p in tmp_path.glob("step-*")))
        removed(path, *args, **kwargs)

    monkeypatch.setattr("fastkd.trainer.run.saved.checkpoint.shutil.rmtree", watch)
    for step in (0, 5, 10, 100_000_000):
        folder.save(step, PARTS, state={"step": step}, manifest={})
    assert seen == [["step-00000005", "step-00000010"], ["step-00000010", "step-100000000"]]
    assert find_checkpoint(tmp_path).name == "step-100000000"
    with pytest.raises(CheckpointError, match="exists already"):
        folder.save(10, PARTS, state={}, manifest={})


@pytest.mark.parametrize("name", FILES)
def test_a_full_disk_names_the_file_and_keeps_the_earlier_checkpoints(tmp_path, monkeypatch, name):
    def full(original, error):
        def write(*args, **kwargs):
            if any(str(argument).endswith(name) for argument in args) and "step-00000005" in str(args):
                raise error
            return original(*args, **kwargs)

        return write

    error = OSError(28, "No space left on device")
    stream = RuntimeError("PytorchStreamWriter failed writing file data/0")
    module = "fastkd.trainer.run.saved.checkpoint"
    monkeypatch.setattr(f"{module}.save_tensors", full(save_tensors, SafetensorError("No space left on device")))
    monkeypatch.setattr(f"{module}.torch.save", full(torch.save, stream))
    monkeypatch.setattr(f"{module}.Path.write_text", full(Path.write_text, error))
    config = tiny_config(tmp_path, epochs=1, save_every_steps=5)
    with pytest.raises(CheckpointError, match=rf"step-00000005/{name}: cannot be written \((\[Errno 28\] )?(No s|Pyt)"):
        train(config)
    folder = Path(config.run_dir, "checkpoints")
    assert sorted(path.name for path in folder.iterdir()) == [".lock", "step-00000000"]
    monkeypatch.undo()
    assert train(dataclasses.replace(config, resume=True)).resumed_from == 0


def test_files_are_durable_before_the_checkpoint_has_its_name(tmp_path, monkeypatch):
    synced, renamed = [], []
    fsync, rename = os.fsync, Path.rename

    def watch_fsync(descriptor):
        synced.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")).name)
        return fsync(descriptor)

    def watch_rename(self, target):
        renamed.append(list(synced))
        return rename(self, target)

    monkeypatch.setattr("fastkd.trainer.run.saved.checkpoint.os.fsync", watch_fsync)
    monkeypatch.setattr("fastkd.trainer.run.saved.checkpoint.Path.rename", watch_rename)
    CheckpointFolder(tmp_path, keep=1).save(1, PARTS, state={}, manifest={})
    assert set(FILES) <= set(renamed[0])
    assert renamed[0][-1].startswith(".tmp-step-00000001")
    assert synced[-1] == tmp_path.name


def test_leftovers_of_a_kill_are_ignored_and_removed(finished, tmp_path):
    config, result = finished
    shutil.copytree(config.run_dir, tmp_path / "run")
    leftover = tmp_path / "run" / "checkpoints" / ".tmp-step-00000099-1"
    shutil.copytree(result.path, leftover)
    assert find_checkpoint(tmp_path / "run").name == "step-00000013"
    CheckpointFolder(tmp_path / "run" / "checkpoints", keep=2)
    assert not leftover.exists()
    leftover.touch()  # whatever made a file of that name
    CheckpointFolder(tmp_path / "run" / "checkpoints", keep=2)
    assert not leftover.exists()


def test_tied_weights_survive(tmp_path):
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(3, 3), nn.Linear(3, 3)
            self.b.weight = self.a.weight

    model = Tied()
    path = CheckpointFolder(tmp_path, 1).save(1, {FILES[0]: model}, state={}, manifest={})
    assert torch.equal(load_file(path / "student.safetensors")["b.weight"], model.a.weight)
