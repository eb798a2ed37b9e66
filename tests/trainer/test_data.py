"""The digits, the labelled subset, the order of the data, any dataset."""

import signal
import subprocess
import sys
import time

import pytest
import torch
from torch.utils.data import TensorDataset

from fastkd.trainer import DataConfig, TensorImages, labelled_subset, load_digits, train
from fastkd.trainer.data.loader import EpochSampler, eval_loader, train_loader
from tests.helpers.trainer_runs import DropoutNet, batch, distiller, lines, noisy_data, one_thread, tiny_config  # noqa: F401


def test_digits_are_split_once_and_for_all():
    (train_a, test_a), (train_b, _), (train_c, _) = load_digits(), load_digits(), load_digits(seed=1)
    assert (len(train_a), len(test_a)) == (1400, 397)
    assert train_a.images.shape == (1400, 1, 8, 8)
    assert (train_a.images.min(), train_a.images.max()) == (-1, 1)
    assert torch.equal(train_a.images, train_b.images)
    assert not torch.equal(train_a.images, train_c.images)
    assert train_a.labels.bincount().min() >= 130
    both = torch.cat([train_a.images, test_a.images]).flatten(1)
    assert len(both.unique(dim=0)) == len(both)  # no image is in both parts


@pytest.mark.parametrize("count", [10, 57, 100, 1400])
def test_the_labelled_subset_is_balanced_seeded_and_drawn_without_replacement(count):
    data, _ = load_digits()
    subset = labelled_subset(data, count, seed=0)
    assert len(subset) == count
    counts = subset.labels.bincount(minlength=10)
    assert counts.max() - counts.min() <= (1 if count < 1400 else 10)
    assert len(subset.images.flatten(1).unique(dim=0)) == count
    assert torch.equal(labelled_subset(data, count, seed=0).images, subset.images)
    if count < 1400:
        assert not torch.equal(labelled_subset(data, count, seed=1).images, subset.images)
    plain = labelled_subset(TensorDataset(data.images, data.labels), count, seed=0)
    assert torch.equal(torch.stack([image for image, _ in plain]), subset.images)


def test_a_subset_of_a_subset_and_its_errors():
    data = TensorDataset(torch.arange(40.0), torch.arange(40) % 4)
    once = labelled_subset(data, 20, seed=0)
    twice = labelled_subset(once, 8, seed=0)
    assert sorted(int(label) for _, label in twice) == [0, 0, 1, 1, 2, 2, 3, 3]
    with pytest.raises(ValueError, match=r"data\.labelled: got 41, expected at most the 40"):
        labelled_subset(data, 41, seed=0)
    with pytest.raises(TypeError, match="list has neither 'labels' nor 'targets'"):
        labelled_subset([(1, 2)], 1, seed=0)


@pytest.mark.parametrize("workers", [0, 2])
def test_the_order_depends_on_seed_and_epoch_alone_and_is_restored_in_the_middle(workers):
    data = TensorImages(torch.arange(40.0).reshape(40, 1, 1, 1), torch.arange(40))
    config = DataConfig(batch_size=8, num_workers=workers)

    def epochs(*numbers, seed=0):
        loader, set_epoch = train_loader(data, config, seed=seed, device=torch.device("cpu"))
        order = []
        for number in numbers:
            set_epoch(number)
            order.append([labels.tolist() for _, labels in loader])
        return order

    both = epochs(0, 1)
    assert sorted(index for labels in both[0] for index in labels) == list(range(40))
    assert epochs(0) == [both[0]]
    assert both[0] != both[1]
    assert epochs(1) == [both[1]]
    assert epochs(0, seed=1) != [both[0]]
    loader, set_epoch = train_loader(data, config, seed=0, device=torch.device("cpu"))
    set_epoch(1)
    iterator = iter(loader)
    head = [next(iterator)[1].tolist() for _ in range(2)]
    resumed, set_epoch = train_loader(data, config, seed=0, device=torch.device("cpu"))
    set_epoch(1, 2)
    assert len(resumed) == 5
    assert head + [labels.tolist() for _, labels in resumed] == both[1]
    set_epoch(2)
    assert [labels.tolist() for _, labels in resumed] == epochs(2)[0]


def test_every_epoch_of_a_run_has_its_own_order(tmp_path):
    class Recorded(TensorImages):
        def __getitems__(self, indices):
            seen.extend(int(index) for index in indices)
            return super().__getitems__(indices)

    seen = []
    images = noisy_data()[1]
    config = tiny_config(tmp_path, run_dir=None, epochs=3)
    train(config, train_data=Recorded(images.images, images.labels), eval_data=images)
    sampler = EpochSampler(20, seed=0)
    expected = []
    for sampler.epoch in range(3):
        expected += list(sampler)
    assert seen[-60:] == expected
    assert seen[-60:-40] != seen[-40:-20] != seen[-20:]


@pytest.mark.parametrize("kind", ["train", "eval"])
def test_a_signal_to_the_whole_process_group_ends_no_worker(kind):
    data = TensorImages(torch.zeros(64, 1), torch.arange(64))
    config = DataConfig(batch_size=4, eval_batch_size=4, num_workers=1)
    cpu = torch.device("cpu")
    loader = train_loader(data, config, 0, cpu)[0] if kind == "train" else eval_loader(data, config, cpu)
    iterator = iter(loader)
    seen = [next(iterator)[1]]
    (worker,) = iterator._workers
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
        subprocess.run(["kill", f"-{number.value}", str(worker.pid)], check=True)
    time.sleep(0.2)
    seen += [labels for _, labels in iterator]
    assert sorted(torch.cat(seen).tolist()) == list(range(64))
    del iterator, loader
    worker.join(10)
    assert not worker.is_alive()


@pytest.mark.slow
def test_a_process_that_ends_within_an_epoch_does_not_wait_for_its_workers():
    program = (
        "import torch; from fastkd.trainer import *; from fastkd.trainer.data.loader import train_loader\n"
        "data = TensorImages(torch.zeros(64, 1), torch.arange(64))\n"
        "config = DataConfig(batch_size=4, num_workers=2)\n"
        "iterator = iter(train_loader(data, config, 0, torch.device('cpu'))[0]); next(iterator)\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)


def test_the_loader_leaves_the_global_generator_alone():
    loader, _ = train_loader(
        TensorImages(torch.zeros(8, 1), torch.zeros(8)), DataConfig(batch_size=4), seed=0, device=torch.device("cpu")
    )
    before = torch.get_rng_state()
    assert len(list(loader)) == 2
    assert torch.equal(torch.get_rng_state(), before)


def test_a_whole_batch_is_one_indexing_operation(monkeypatch):
    calls = []
    fetch = TensorImages.__getitems__
    monkeypatch.setattr(TensorImages, "__getitems__", lambda self, i: calls.append(len(i)) or fetch(self, i))
    monkeypatch.setattr(TensorImages, "__getitem__", None)
    data = TensorImages(torch.randn(20, 1, 2, 2), torch.arange(20))
    loader, _ = train_loader(data, DataConfig(batch_size=8, drop_last=False), seed=0, device=torch.device("cpu"))
    for images, labels in loader:
        assert torch.equal(images, data.images[labels])
    assert calls == [8, 8, 4]


def test_any_map_style_dataset_trains(tmp_path):
    images, labels = noisy_data()[1].images, noisy_data()[1].labels
    pairs = list(zip(images, labels.tolist(), strict=True))
    config = tiny_config(tmp_path, run_dir=None, epochs=1)
    assert train(config, train_data=pairs, eval_data=TensorDataset(images, labels)).history[0]["step"] == 5
    with pytest.raises(ValueError, match="train_data, eval_data: got one of them"):
        train(config, train_data=pairs)
    with pytest.raises(ValueError, match="eval_data: got an empty dataset"):
        train(config, train_data=pairs, eval_data=[])
