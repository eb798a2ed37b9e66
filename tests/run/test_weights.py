"""Weights files: every usual layout loads, what is broken is refused in one line."""

import argparse
import collections
import json
import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, ResNet

from fastkd.trainer import CheckpointError, ModelConfig, build_model, find_classifier, load_weights
from fastkd.trainer.models.weights import Origin, load_into, origin_of_file, read_weights, save_tensors
from fastkd.trainer.run.saved.checkpoint import find_weights

State = dict[str, Tensor]


class Net(nn.Module):
    """A convolution, batch norm, a classifier."""

    def __init__(self, classes: int = 5) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.bn = nn.BatchNorm2d(4)
        self.fc = nn.Linear(4, classes)

    def forward(self, images: Tensor) -> Tensor:
        return self.fc(self.bn(self.conv(images)).mean((2, 3)))


def trained() -> State:
    torch.manual_seed(3)
    model = Net()
    model(torch.randn(4, 3, 8, 8))
    return dict(model.state_dict())


def prefixed(prefix: str, state: State) -> State:
    return {prefix + name: value for name, value in state.items()}


def other() -> State:
    return {name: value + 1 for name, value in trained().items()}


# What is saved, the name of the file, and what is told of it.
LAYOUTS: dict[str, tuple[Callable[[State], Any], str, str]] = {
    "bare": (lambda s: s, "w.pth", ""),
    "safetensors": (lambda s: s, "w.safetensors", ""),
    "ordered": (collections.OrderedDict, "w.bin", ""),
    "torchvision": (lambda s: {"model": s, "epoch": 3, "args": argparse.Namespace(lr=0.1)}, "w.pth", "key model"),
    "timm": (
        lambda s: {
            "epoch": 3,
            "arch": "net",
            "state_dict": other(),
            "state_dict_ema": s,
            "args": argparse.Namespace(model="net"),
            "optimizer": {"state": {}, "param_groups": [{"lr": 0.1}]},
        },
        "model_best.pth.tar",
        "key state_dict_ema",
    ),
    "no average": (lambda s: {"state_dict": s, "state_dict_ema": None}, "w.pth.tar", "key state_dict"),
    "DataParallel": (lambda s: {"state_dict": prefixed("module.", s)}, "w.pth.tar", "key state_dict, prefix module."),
    "compiled": (lambda s: prefixed("_orig_mod.", s), "w.pt", "prefix _orig_mod."),
    "DDP and compiled": (lambda s: prefixed("module._orig_mod.", s), "w.pt", "prefix module._orig_mod."),
    "compiled in parts": (
        lambda s: {name.replace("conv.", "conv._orig_mod."): value for name, value in s.items()},
        "w.pt",
        "",
    ),
    "Lightning": (
        lambda s: {"state_dict": prefixed("model._orig_mod.", s), "pytorch-lightning_version": "2.5", "callbacks": {}},
        "last.ckpt",
        "key state_dict, prefix model._orig_mod.",
    ),
    "Lightning with a teacher": (
        lambda s: {"state_dict": prefixed("student.", s) | prefixed("teacher.", other())},
        "last.ckpt",
        "key state_dict, prefix student., 9 entries without the prefix left out",
    ),
    "averaged": (
        lambda s: {"model": other(), "model_ema": {"n_averaged": torch.tensor(7), **prefixed("module.", s)}},
        "w.pth",
        "key model_ema, prefix module., 1 entries without the prefix left out",
    ),
    "nested": (lambda s: {"model": {"state_dict": s}, "ema": {"decay": 0.9}}, "w.pth", "key model.state_dict"),
    "no counters": (lambda s: {n: v for n, v in s.items() if "num_batches" not in n}, "old.pth", ""),
    "half precision": (lambda s: {n: v.half() if v.is_floating_point() else v for n, v in s.items()}, "w.pt", ""),
    "a best accuracy of NumPy's": (
        lambda s: {"state_dict": s, "best_acc1": np.float64(71.5), "epoch": np.int64(3)},
        "w.pth.tar",
        "key state_dict",
    ),
    "a backbone": (lambda s: {"model_state": prefixed("backbone.", s)}, "w.pt", "key model_state, prefix backbone."),
    "Hugging Face": (lambda s: prefixed("timm_model.", s), "model.safetensors", "prefix timm_model."),
    "legacy format": (lambda s: s, "legacy.pth", ""),
}


def write(content: Any, path: Path) -> Path:
    if path.suffix == ".safetensors":
        save_file(content, path)
    else:
        torch.save(content, path, _use_new_zipfile_serialization=not path.name.startswith("legacy"))
    return path


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_usual_layout_loads_and_says_what_was_read(tmp_path: Path, layout: str) -> None:
    make, name, told = LAYOUTS[layout]
    expected = trained()
    model = Net()
    line = find_weights(write(make(expected), tmp_path / name)).load_into(model, "teacher")
    assert line == ", ".join(filter(None, [f"teacher weights: {tmp_path / name}", told]))
    for key, value in model.state_dict().items():
        if layout == "no counters" and "num_batches" in key:
            assert value == 0
        elif layout == "half precision":
            assert torch.equal(value, expected[key].half().to(value.dtype))
        else:
            assert torch.equal(value, expected[key]), key


def test_without_a_module_the_prefixes_of_ddp_and_compile_are_left_out(tmp_path: Path) -> None:
    for prefix in ("module.", "_orig_mod.module.", "module._orig_mod."):
        found = load_weights(write({"state_dict": prefixed(prefix, trained())}, tmp_path / "w.pt"))
        assert found.keys() == trained().keys()


def test_a_module_that_has_the_prefix_itself_keeps_it(tmp_path: Path) -> None:
    inner = Net()
    inner.load_state_dict(trained())
    outer = nn.ModuleDict({"model": Net()})
    path = write(prefixed("model.", inner.state_dict()), tmp_path / "w.pt")
    assert "prefix" not in find_weights(path).load_into(outer)
    assert torch.equal(outer["model"].fc.weight, inner.fc.weight)


class Pickled(nn.Linear):
    """A whole model in the file."""


def as_sparse(state: State) -> dict[str, Any]:
    return {**state, "fc.weight": state["fc.weight"].to_sparse()}


def changed(name: str, change: Callable[[Tensor], Tensor]) -> Callable[[State], Any]:
    return lambda state: {**state, name: change(state[name])}


# What is saved, and what is told; every message begins with the file.
BROKEN: dict[str, tuple[Callable[[State], Any], str]] = {
    "NaN": (changed("fc.bias", lambda x: x * torch.nan), r"fc\.bias has values that are not finite"),
    "infinite": (changed("conv.weight", lambda x: x / 0), r"conv\.weight has values that are not finite"),
    "int8": (changed("fc.weight", lambda x: x.to(torch.int8)), r"fc\.weight: torch\.int8 in the file, torch\.float32"),
    "complex": (changed("fc.weight", lambda x: x + 0j), r"fc\.weight: torch\.complex64 in the file"),
    "float8": (changed("fc.weight", lambda x: x.to(torch.float8_e4m3fn)), r"fc\.weight: torch\.float8_e4m3fn in the"),
    "sparse": (as_sparse, r"fc\.weight is sparse, quantised or without values"),
    "no values": (changed("fc.weight", lambda x: x.to("meta")), r"cannot be read|without values"),
    "a whole model": (lambda s: {"model": Pickled(2, 2)}, r"it needs .*Pickled; save the model's state_dict\(\)"),
    "no state dict": (
        lambda s: {"epoch": 3, "loss": 0.1},
        r"holds no state dict .*, but a dict of 2 entries \(epoch, ",
    ),
    "a list": (lambda s: [s], "holds no state dict .*, but list"),
    "names that are no text": (lambda s: dict(enumerate(s.values())), "names are of type int"),
    "other classes": (
        lambda s: dict(Net(7).state_dict()),
        r"2 of another shape .* the file has 7 classes: num_classes=7 \(--teacher\.num-classes\)",
    ),
    "nothing in common": (
        lambda s: {f"layer{i}.{name}": value for i in range(20) for name, value in s.items()},
        r"8 missing \(conv\.weight, conv\.bias, bn\.weight, bn\.bias, \.\.\.\); 180 unexpected \(layer0\.conv\.weight, "
        r"layer0\.conv\.bias, layer0\.bn\.weight, layer0\.bn\.bias, \.\.\.\)$",
    ),
}


@pytest.mark.filterwarnings("ignore:Sparse invariant")
@pytest.mark.parametrize("kind", BROKEN)
def test_what_is_broken_is_refused_in_one_line(tmp_path: Path, kind: str) -> None:
    make, told = BROKEN[kind]
    model = Net()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    path = write(make(trained()), tmp_path / "w.pth")
    with pytest.raises(CheckpointError, match=told) as caught:
        find_weights(path).load_into(model, "teacher")
    message = str(caught.value)
    assert message.startswith(str(path))
    assert "\n" not in message
    assert len(message) < 600
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_files_that_are_no_weights_are_refused_in_one_line(tmp_path: Path) -> None:
    torch.jit.save(torch.jit.script(nn.Linear(2, 2)), tmp_path / "script.pt")
    (tmp_path / "text.pth").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    (tmp_path / "cut.safetensors").write_bytes(write(trained(), tmp_path / "w.safetensors").read_bytes()[:-3])
    (tmp_path / "empty.pth").touch()
    for name, told in (
        ("script.pt", "TorchScript archive; save"),
        ("text.pth", r"cannot be read as tensors and plain types \(.*[a-z]{4}"),
        ("empty.pth", r"\(it is empty\)"),
        ("cut.saf", "trunc"),
    ):
        with pytest.raises(CheckpointError, match=told) as caught:
            read_weights(next(tmp_path.glob(f"{name}*")))
        assert "\n" not in str(caught.value)


def test_the_names_that_a_message_shows_are_no_counters(tmp_path: Path) -> None:
    path = write(prefixed("x.", trained()), tmp_path / "w.safetensors")  # which has integers first
    with pytest.raises(CheckpointError, match=r"9 unexpected \(x\.bn\.bias, "):
        find_weights(path).load_into(Net())


def test_what_a_file_says_of_its_origin_is_read_and_what_is_malformed_is_not(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    said = {"classes": ["ant", "bee"], "mean": [0.1, 0, -0.1], "std": [1.0, 2.0, 3.0], "image_size": 32, "crop": 0.9}
    save_tensors(trained(), path, {name: json.dumps(value) for name, value in said.items()})
    assert origin_of_file(path) == Origin(["ant", "bee"], {name: said[name] for name in list(said)[1:]})
    wrong = {"classes": [1], "mean": [0, 1], "std": [0, 1, 1], "image_size": "32", "crop": [1]}
    save_tensors(trained(), path, {name: json.dumps(value) for name, value in wrong.items()})
    assert origin_of_file(path) == Origin()
    for other in (path.with_name("none.safetensors"), write(trained(), tmp_path / "w.pth")):
        assert origin_of_file(other) == Origin()


def test_a_mask_may_hold_infinities_where_the_model_has_them() -> None:
    class Masked(Net):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("mask", torch.full((2,), -torch.inf))

    state = dict(Masked().state_dict())
    load_into(Masked(), state, "w.pt")
    with pytest.raises(CheckpointError, match="mask has values that are not finite"):
        load_into(Masked(), {**state, "mask": torch.full((2,), torch.nan)}, "w.pt")


def test_files_have_the_mode_that_the_umask_gives(tmp_path: Path) -> None:
    for umask, mode in ((0o022, 0o644), (0o077, 0o600), (0o002, 0o664)):
        before = os.umask(umask)
        try:
            save_tensors({"a": torch.zeros(2)}, tmp_path / f"{umask}.safetensors")
        finally:
            os.umask(before)
        assert stat.S_IMODE((tmp_path / f"{umask}.safetensors").stat().st_mode) == mode


def test_a_layer_called_linear_is_a_classifier() -> None:
    model = Net()
    model.linear, model.fc = model.fc, nn.Identity()
    assert find_classifier(model) == "linear"
    assert find_classifier(ResNet(BasicBlock, [1, 1, 1, 1])) == "fc"


def test_weights_switch_published_ones_off() -> None:
    assert not ModelConfig(name="timm:resnet18", pretrained=True, weights="w.pth").pretrained


@pytest.mark.parametrize("error", [OSError("<urlopen error [Errno -3]>"), "hub"])
def test_published_weights_without_a_network_name_the_flag_for_a_file(
    monkeypatch: pytest.MonkeyPatch, error: Any
) -> None:
    if error == "hub":
        from huggingface_hub.errors import LocalEntryNotFoundError

        error = LocalEntryNotFoundError("cannot reach the hub\nlong story")

    def fail(*_args: Any, **_options: Any) -> None:
        raise error

    monkeypatch.setattr("timm.create_model", fail)
    with pytest.raises(OSError, match=r"^teacher\.pretrained: .*'timm:resnet18' .*: --teacher\.weights FILE$"):
        build_model(ModelConfig(name="timm:resnet18", pretrained=True), "teacher")
