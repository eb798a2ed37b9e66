"""Measures a frozen teacher's forward pass with its batch norms as they are and folded into its convolutions.

    python -m bench.trainer.fold [--models resnet34 resnet50] [--batch 16] [--rounds 15] [--device cpu] [--compile]

Both take turns, so that what else the machine does meets both. On a CPU the time is what the process has used, of all
threads. The models are torchvision's, with random weights.
"""

import argparse
import time
from functools import partial

import torch
import torchvision

from bench.report import hardware, table
from fastkd.trainer.models.features import FeatureModel
from fastkd.trainer.run.distiller import FrozenModel


def seconds(model: FrozenModel, images: torch.Tensor, precision: torch.dtype) -> float:
    clock = time.process_time if images.device.type == "cpu" else time.perf_counter
    begun = clock()
    with torch.autocast(images.device.type, precision, enabled=precision != torch.float32):
        model(images)
    if images.device.type == "cuda":
        torch.cuda.synchronize()
    return clock() - begun


def compare(name: str, batch: int, rounds: int, device: str, precision: torch.dtype, compiled: bool) -> list[str]:
    """A row of the table: the fastest rounds in ms, which others on the machine disturb least, and their ratio."""
    network = torchvision.models.get_model(name)
    images = torch.randn(batch, 3, 224, 224)
    plain, folded = (FrozenModel(FeatureModel(network)).to(device) for _ in range(2))
    told = folded.fold(images[:2])
    if folded.computing is folded.model:
        raise SystemExit(told)
    for model in (plain, folded):
        if device != "cpu":
            model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
            model.computing.channels_last = True
        if compiled:
            model.computing.compile()
    run = partial(seconds, images=images.to(device), precision=precision)
    for model in (plain, folded, plain, folded):
        run(model)
    pairs = [(run(plain), run(folded)) for _ in range(rounds)]
    before, after = (1e3 * min(times) for times in zip(*pairs, strict=True))
    return [name, f"{before:.1f}", f"{after:.1f}", f"{before / after:.2f}"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["resnet34", "resnet50", "mobilenet_v2"])
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--precision", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--compile", action="store_true", help="run both through torch.compile")
    chosen = parser.parse_args()
    precision = getattr(torch, chosen.precision)
    rows = [
        compare(name, chosen.batch, chosen.rounds, chosen.device, precision, chosen.compile) for name in chosen.models
    ]
    where = torch.cuda.get_device_name() if chosen.device != "cpu" else hardware()
    print(f"{where}, batch {chosen.batch}, {chosen.precision}" + (", compiled" if chosen.compile else ""))
    print("\n".join(table(["case", "ms", "ms folded", "times as fast"], rows)))


if __name__ == "__main__":
    main()
