"""Instances, buffers of the caller's, graphs that are replayed."""

from __future__ import annotations

import threading

import numpy as np
import pytest

from benchmarks.cuda_device import count
from benchmarks.cuda_measure import OnDevice
from bnncc.runtime.session import load

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module")
def demo(built):
    """The artifact of the demo network, some images, and what it makes of each."""
    entry = built.section("demo")
    path = built.path(entry["artifact"])
    with np.load(built.path(entry["images"])) as arrays:
        images = [image[None] for image in arrays["arr_0"][:16]]
    with load(path, device="cuda") as session:
        return path, images, [session(image) for image in images]


def test_replays_of_the_graph_are_equal(demo):
    path, images, expected = demo
    with load(path, device="cuda") as session:
        for _ in range(20):
            for image, wanted in zip(images, expected, strict=True):
                assert np.array_equal(session(image), wanted)


def test_instances_at_once(demo):
    """Each in a thread of its own, all at the same time."""
    path, images, expected = demo
    wrong = []

    def work(number):
        with load(path, device="cuda") as session:
            for i in range(number, number + 3 * len(images)):
                if not np.array_equal(session(images[i % len(images)]), expected[i % len(images)]):
                    wrong.append((number, i))

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_pinned_buffers(demo):
    path, images, expected = demo
    with load(path, device="cuda") as session:
        (source,), outputs = session.pinned()
        for image, wanted in zip(images, expected, strict=True):
            source[...] = image
            assert session(source, out=outputs) is outputs[0]
            assert np.array_equal(outputs[0], wanted)


def test_buffers_on_the_gpu(demo, gpu):
    """Several pairs of them take turns, so that the graph's parameters change between replays."""
    path, images, expected = demo
    with load(path, device="cuda") as session:
        runs = [OnDevice(gpu, session, image) for image in images[:3]]
        for _ in range(5):
            for run, wanted in zip(runs, expected, strict=False):
                run.clear()
                run.run(gpu.stream)
                gpu.synchronize()
                assert np.array_equal(run.output(), wanted)


def _torch():
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip(f"torch {torch.__version__} sees no GPU")
    return torch


def test_tensors_of_torch(demo):
    """In and out through DLPack, in torch's own stream, without a copy to the host."""
    torch = _torch()
    path, images, expected = demo
    with load(path, device="cuda") as session:
        for image, wanted in zip(images, expected, strict=True):
            x = torch.from_numpy(image).cuda() * 1
            result = torch.from_dlpack(session(x))
            assert result.is_cuda and np.array_equal(result.cpu().numpy(), wanted)
            out = torch.empty_like(result)
            stream = torch.cuda.Stream()
            with torch.cuda.stream(stream):
                session(x, out=[out], stream=stream)
                twice = out * 2
            stream.synchronize()
            assert np.array_equal(twice.cpu().numpy(), 2 * wanted)


def test_two_gpus(demo):
    if count() < 2:
        pytest.skip("there is one GPU")
    path, images, expected = demo
    with load(path, device="cuda:0") as first, load(path, device="cuda:1") as second:
        assert (first.device, second.device) == ("cuda:0", "cuda:1")
        for image, wanted in zip(images, expected, strict=True):
            assert np.array_equal(first(image), wanted)
            assert np.array_equal(second(image), wanted)
