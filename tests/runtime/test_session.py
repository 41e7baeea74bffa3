"""Running an artifact in this process."""

import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from bnncc import runtime
from bnncc.runtime.errors import ExecutionError, InputError


@pytest.fixture
def session(artifact):
    with runtime.load(artifact) as session:
        yield session


def test_runs_by_position_and_by_name(tiny, session):
    x, n = tiny.inputs()
    tiny.check(session(x, n), x, n)
    named = session.run({"n": n, "x": x})
    assert list(named) == ["y", "m"]
    tiny.check(named.values(), x, n)


def test_describes_inputs_and_outputs(session):
    assert [(p["name"], p["shape"], p["dtype"]) for p in session.inputs] == [
        ("x", [6, 1024], "float32"),
        ("n", [3], "int64"),
    ]
    assert [p["name"] for p in session.outputs] == ["y", "m"]
    assert session.manifest["name"] == "tiny"


def test_outputs_are_new_aligned_arrays(tiny, session):
    x, n = tiny.inputs()
    first, second = session(x, n)[0], session(x, n)[0]
    assert not np.shares_memory(first, second)
    assert first.ctypes.data % 64 == 0 and first.flags.writeable and first.flags.c_contiguous


@pytest.mark.parametrize("offset", [0, 4, 16, 60])
def test_takes_arrays_of_any_alignment(tiny, session, offset):
    x, n = tiny.inputs()
    memory = np.empty(x.nbytes + 128, np.uint8)
    start = -memory.ctypes.data % 64 + offset
    shifted = memory[start : start + x.nbytes].view(np.float32).reshape(x.shape)
    shifted[...] = x
    tiny.check(session(shifted, n), x, n)


def test_takes_arrays_of_any_strides(tiny, session):
    x, n = tiny.inputs()
    for strided in (np.asfortranarray(x), np.repeat(x, 2, axis=1)[:, ::2], x[::-1, ::-1].copy()[::-1, ::-1]):
        assert not strided.flags.c_contiguous
        tiny.check(session(strided, n), x, n)
        assert session.bench(1, [strided, n])


def test_outputs_go_where_the_caller_says(tiny, session):
    """Also to memory that is not aligned, which the driver does not use in place."""
    x, n = tiny.inputs()
    y, m = np.zeros(x.size + 1, np.float32)[1:].reshape(x.shape), np.zeros_like(n)
    returned = session(x, n, out=(y, m))
    assert returned[0] is y and returned[1] is m
    tiny.check((y, m), x, n)


@pytest.mark.parametrize(
    ("out", "message"),
    [
        (lambda y, m: (y,), r"the model has 2 output\(s\) \(y, m\), 1 given"),
        (lambda y, m: (y[:3], m), r"output 'y' has shape \(3, 1024\), the model was compiled for \(6, 1024\)"),
        (lambda y, m: (y, m.astype(np.int32)), r"output 'm' has dtype int32, the model gives int64"),
        (lambda y, m: (np.asfortranarray(y), m), r"output 'y' must be a NumPy array, contiguous and writeable"),
        (lambda y, m: (y, m.tolist()), r"output 'm' must be a NumPy array"),
    ],
)
def test_refuses_outputs_that_do_not_fit(tiny, session, out, message):
    x, n = tiny.inputs()
    with pytest.raises(InputError, match=message):
        session(x, n, out=out(np.empty_like(x), np.empty_like(n)))


def test_buffers_of_the_session_outlive_it(tiny, artifact):
    x, n = tiny.inputs()
    with runtime.load(artifact) as session:
        inputs, outputs = session.pinned()
        inputs[0][...], inputs[1][...] = x, n
        assert all(array.ctypes.data % 64 == 0 for array in (*inputs, *outputs))
        session(*inputs, out=outputs)
    tiny.check(outputs, x, n)
    part = outputs[0][1:]
    del inputs, outputs
    assert str(artifact) in Path("/proc/self/maps").read_text()
    tiny.check((np.vstack([tiny.expected(x, n)[0][:1], part]), n + 1), x, n)
    del part
    assert str(artifact) not in Path("/proc/self/maps").read_text()


@pytest.mark.parametrize("threads", [1, 2, 3, 8, None])
def test_threads_do_not_change_results(tiny, artifact, threads):
    x, n = tiny.inputs()
    with runtime.load(artifact, threads=threads) as session:
        for _ in range(50):
            tiny.check(session(x, n), x, n)
        session.set_threads(2)
        tiny.check(session(x, n), x, n)


def test_io_alignment_can_be_lower(tiny, tmp_path):
    tiny.build(tmp_path / "tiny.so", io_alignment=4)
    assert runtime.read_manifest(tmp_path / "tiny.so")["io_alignment"] == 4


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x, n: (x[:5], n), r"input 'x' has shape \(5, 1024\), the model was compiled for \(6, 1024\)"),
        (lambda x, n: (x[:0], n), r"input 'x' is empty and has shape \(0, 1024\)"),
        (lambda x, n: (x[None], n), r"input 'x' has shape \(1, 6, 1024\)"),
        (lambda x, n: (x.astype(np.float64), n), r"input 'x' has dtype float64, the model takes float32"),
        (lambda x, n: (x.astype(">f4"), n), r"input 'x' has dtype >f4, the model takes float32"),
        (lambda x, n: (x, n.astype(np.int32)), r"input 'n' has dtype int32, the model takes int64"),
        (lambda x, n: (x,), r"the model has 2 input\(s\) \(x, n\), 1 given"),
    ],
)
def test_refuses_wrong_inputs(tiny, session, change, message):
    with pytest.raises(InputError, match=message) as caught:
        session(*change(*tiny.inputs()))
    assert "\n" not in str(caught.value)


def test_refuses_wrong_names(tiny, session):
    x, n = tiny.inputs()
    with pytest.raises(InputError, match=r"no input 'image'; the model's inputs are x, n"):
        session.run({"x": x, "n": n, "image": x})
    with pytest.raises(InputError, match=r"input 'n' is missing; the model's inputs are x, n"):
        session.run({"x": x})


@pytest.mark.parametrize("threads", [0, -1])
def test_refuses_no_threads(artifact, threads):
    with pytest.raises(InputError, match=r"threads must be 1 or more, or None"):
        runtime.load(artifact, threads=threads)


def test_refuses_too_many_threads(artifact):
    with pytest.raises(ExecutionError, match=r"tiny: 100000 threads asked for; 1 to 1024 are supported"):
        runtime.load(artifact, threads=100000)


@pytest.mark.parametrize("device", ["cuda", "cuda:0"])
def test_refuses_a_gpu_for_an_artifact_of_the_cpu(artifact, device):
    with pytest.raises(
        InputError, match=rf"device '{device}' cannot run the artifact, .* for x86-64-v2; its device is cpu"
    ):
        runtime.load(artifact, device=device)


def test_refuses_arrays_of_a_gpu_on_the_cpu(tiny, session):
    class OnGpu:
        """As a tensor of torch answers."""

        def __dlpack_device__(self):
            return 2, 0

        def __array__(self, dtype=None, copy=None):
            raise TypeError("can't convert cuda:0 device type tensor to numpy.")

    with pytest.raises(InputError, match=r"an input lies in a GPU's memory, and the session runs on the cpu; copy it"):
        session(OnGpu(), tiny.inputs()[1])


@pytest.mark.parametrize("device", ["", "gpu", "cpu:0", "cuda:", "cuda:-1", "cuda:one"])
def test_refuses_unknown_devices(artifact, device):
    with pytest.raises(InputError, match=rf"unknown device '{device}'; a device is cpu, cuda, or cuda:N"):
        runtime.load(artifact, device=device)


def test_the_cpu_is_a_device(tiny, artifact):
    x, n = tiny.inputs()
    with runtime.load(artifact, device="cpu") as session:
        assert session.device == "cpu"
        with pytest.raises(InputError, match=r"a stream is given, and the inputs lie in the host's memory"):
            session(x, n, stream=1)


def test_a_closed_session_says_so(tiny, artifact):
    session = runtime.load(artifact)
    session.close()
    session.close()
    with pytest.raises(InputError, match=r"the session of model 'tiny' is closed"):
        session(*tiny.inputs())


def test_a_failing_kernel_is_one_line(tiny, tmp_path):
    """A kernel checks its arguments; here the plan hands it a tensor of the wrong shape."""
    import dataclasses

    from bnncc.targets.link import link

    plan = tiny.plan()
    wrong = dataclasses.replace(plan.tensors[4], shape=(3, 1024))
    plan = dataclasses.replace(plan, tensors=(*plan.tensors[:4], wrong, *plan.tensors[5:]))
    link([tiny.version(plan)], tmp_path / "a.so")
    with runtime.load(tmp_path / "a.so") as session:
        with pytest.raises(
            ExecutionError, match=r"kernel affine failed: ValueError: Invalid affine\.shape\[0\]"
        ) as caught:
            session(*tiny.inputs())
        assert "\n" not in str(caught.value)


def test_two_sessions_in_two_threads(tiny, artifact):
    failures = []

    def work(seed):
        try:
            with runtime.load(artifact, threads=2) as session:
                for i in range(100):
                    x, n = tiny.inputs(seed * 1000 + i)
                    tiny.check(session(x, n), x, n)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


def test_one_session_in_two_threads_takes_turns(tiny, session):
    failures = []

    def work(seed):
        try:
            for i in range(50):
                x, n = tiny.inputs(seed * 1000 + i)
                tiny.check(session(np.asfortranarray(x), n), x, n)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


def test_the_gil_is_released(tiny, session):
    """While one thread runs the model over and over inside C, Python code elsewhere goes on."""
    ticks, stop = [0], threading.Event()

    def tick():
        while not stop.is_set():
            ticks[0] += 1
            time.sleep(0)

    thread = threading.Thread(target=tick)
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1000)  # without a release nobody else would get a turn
    try:
        thread.start()
        deadline = time.monotonic() + 60
        while ticks[0] <= 100 and time.monotonic() < deadline:
            session.bench(100)
        seen = ticks[0]
    finally:
        stop.set()
        sys.setswitchinterval(interval)
        thread.join()
    assert seen > 100


def test_steps_and_tensors(tiny, session):
    x, n = tiny.inputs()
    session.write(0, x)
    session.write(1, n)
    session.run_steps(0, 1)
    middle = session.read(4)
    np.testing.assert_allclose(middle, x * session.read(3) + 1, rtol=1e-5, atol=1e-6)
    session.write(4, np.zeros_like(x))
    session.run_steps(1, 2)
    np.testing.assert_allclose(session.read(5), np.full(x.shape, 2.0), rtol=1e-6)
    np.testing.assert_array_equal(session.read(6), n + 1)
    tiny.check(session(x, n), x, n)


def test_steps_and_tensors_out_of_range(session):
    with pytest.raises(InputError, match=r"no tensor 7; the model has 7"):
        session.read(7)
    with pytest.raises(InputError, match=r"tensor 2 \('w'\) is a constant"):
        session.write(2, np.zeros(1024, np.float32))
    with pytest.raises(InputError, match=r"tensor 1 takes 24 bytes, 16 were given"):
        session.write(1, np.zeros(2, np.int64))
    with pytest.raises(ExecutionError, match=r"steps 2 to 4 asked for, the model has 3"):
        session.run_steps(2, 2)


def test_a_replaced_file_is_loaded_anew(tiny, tmp_path):
    """The system's loader would hand out the library it already has under this name."""
    path, (x, n) = tmp_path / "tiny.so", tiny.inputs()
    tiny.build(path, seed=0)
    with runtime.load(path) as first:
        tiny.build(path, seed=5)
        with runtime.load(path) as second:
            tiny.check(second(x, n), x, n, seed=5)
        tiny.check(first(x, n), x, n, seed=0)


def test_closing_gives_everything_back(tiny, artifact):
    x, n = tiny.inputs()
    with runtime.load(artifact, threads=4) as session:
        session(x, n)
        assert str(artifact) in Path("/proc/self/maps").read_text()
        assert len(list(Path("/proc/self/task").iterdir())) > 3
    before = len(list(Path("/proc/self/fd").iterdir()))
    for _ in range(20):
        runtime.load(artifact).close()
    assert len(list(Path("/proc/self/fd").iterdir())) == before
    assert str(artifact) not in Path("/proc/self/maps").read_text()


def test_a_forked_child_can_run(tiny, artifact):
    program = """
import os, sys
import numpy as np
from bnncc import runtime
session = runtime.load(sys.argv[1], threads=3)
x, n = np.ones((6, 1024), np.float32), np.arange(3)
before = session(x, n)[0]
child = os.fork()
if not child:
    same = np.array_equal(session(x, n)[0], before)
    session.close()
    os._exit(0 if same else 1)
sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
    subprocess.run([sys.executable, "-W", "ignore", "-c", program, artifact], check=True, timeout=60)


def test_runs_without_torch_and_tvm(artifact):
    """As on a Raspberry Pi: NumPy and the standard library are all there is."""
    program = """
import sys

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] not in allowed:
            raise ImportError(f"{name} is not here")

allowed = {*sys.stdlib_module_names, *sys.builtin_module_names, "numpy", "bnncc"}
sys.meta_path.insert(0, Refuse())
import numpy as np
from bnncc import runtime
with runtime.load(sys.argv[1]) as session:
    y, m = session(np.zeros((6, 1024), np.float32), np.arange(3))
assert np.allclose(y, np.exp(np.float32(1)) + 1) and m.tolist() == [1, 2, 3]
"""
    result = subprocess.run([sys.executable, "-c", program, artifact], capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr
