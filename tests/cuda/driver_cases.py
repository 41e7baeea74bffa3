"""What test_driver.py runs, each function in a process of its own, in which libcuda.so.1 is driver_proxy.c."""

import contextlib
import gc
import threading

import numpy as np
from driver_tools import Array, Stream, called, check, fetch, inputs, main, proxy, tensor_in, weights

from bnncc import runtime
from bnncc.runtime.errors import InputError
from bnncc.runtime.gpu import DeviceArray


def replays_one_graph(path):
    """Init steps once and one by one; then every run is one launch of the graph, and nothing is allocated."""
    with runtime.load(path) as session:
        assert session.device == "cuda:0" and session.version["name"] == "cuda-sm_90"
        assert called("cuLaunchKernel") == 1 and called("cuGraphAddKernelNode") == 4
        session(*inputs(0))
        proxy.proxy_forget()
        for seed in range(3):
            x, n = inputs(seed)
            check(session(x, n), x, n)
        assert called("cuGraphLaunch") == 3 and called("cuLaunchKernel") == 0
        assert called("cuStreamSynchronize") == 3 and called("cuMemAlloc_v2") == called("cuMemHostAlloc") == 0
        assert called("cuGraphExecKernelNodeSetParams") == 0


def strided_and_named_inputs(path):
    with runtime.load(path) as session:
        x, n = inputs()
        check(session(np.asfortranarray(x), n), x, n)
        named = session.run({"n": n, "x": x})
        assert list(named) == ["y", "m"]
        check(named.values(), x, n)


def pinned_memory_is_copied_directly(path):
    """Without staging memory of the driver's own."""
    with runtime.load(path) as session:
        arrays, outputs = session.pinned()
        assert called("cuMemHostAlloc") == 4
        for seed in range(3):
            x, n = inputs(seed)
            arrays[0][...], arrays[1][...] = x, n
            returned = session(*arrays, out=outputs)
            assert returned[0] is outputs[0]
            check(outputs, x, n)
        assert called("cuMemHostAlloc") == 4
        x, n = inputs(9)
        check(session(arrays[0], n), arrays[0], n)  # the one pinned, the other not
        assert called("cuMemHostAlloc") == 5


def large_inputs_are_copied_in_parts(path):
    """Of one MiB, so that the GPU fetches one while the CPU fills the next."""
    with runtime.load(path) as session:
        x = np.arange(640000, dtype=np.float32)
        for _ in range(2):
            np.testing.assert_array_equal(session(x), x + 1)
        proxy.proxy_forget()
        np.testing.assert_array_equal(session(x[::-1]), x[::-1] + 1)
        assert called("cuMemcpyAsync") == 4 and called("cuMemHostAlloc") == 0


def inspects_steps_and_tensors(path):
    with runtime.load(path) as session:
        x, n = inputs()
        session.write(0, x)
        session.write(1, n)
        proxy.proxy_forget()
        session.run_steps(0, 1)
        assert called("cuLaunchKernel") == 1 and called("cuGraphLaunch") == 0
        np.testing.assert_allclose(session.read(4), x * session.read(3) + 1, rtol=1e-5, atol=1e-6)
        np.testing.assert_array_equal(session.read(2), weights())
        session.write(4, np.zeros_like(x))
        session.run_steps(1, 2)
        np.testing.assert_allclose(session.read(6), np.full(x.shape, 2.0), rtol=1e-6)
        np.testing.assert_array_equal(session.read(7), n + 1)
        proxy.proxy_forget()
        session.run_steps(0, 3)
        assert called("cuLaunchKernel") == 0 and called("cuGraphLaunch") == 1
        check((session.read(6), session.read(7)), x, n)
        with contextlib.suppress(InputError):
            session.write(2, weights())
            raise AssertionError("a constant was written")
        assert min(session.bench(3)) > 0


def gpu_arrays_are_used_in_place(path):
    """No copies; of the graph, only kernels that take an input or output change, and only where it is another one."""
    with runtime.load(path) as session:
        x, n = inputs()
        a, b = Array(session, x), Array(session, n)
        proxy.proxy_forget()
        y, m = session(a, b)
        assert called("cuMemcpyAsync") == 0 and called("cuGraphExecKernelNodeSetParams") == 3  # not exp
        assert isinstance(y, DeviceArray) and (y.shape, y.dtype, y.device) == (x.shape, x.dtype, "cuda:0")
        assert a.streams == [session._instance.stream]
        check((y.numpy(), m.numpy()), x, n)
        proxy.proxy_forget()
        again = session(a, b, out=(y, m))
        assert again == (y, m) and called("cuGraphExecKernelNodeSetParams") == 0 and called("cuMemAlloc_v2") == 0
        other = Array(session, x + 1)
        proxy.proxy_forget()
        session(other, b, out=(y, m))
        assert called("cuGraphExecKernelNodeSetParams") == 1
        check((y.numpy(), m.numpy()), x + 1, n)
        check(session(x, n), x, n)  # back at home
        named = session.run({"n": b, "x": a})
        check([named[name].numpy() for name in ("y", "m")], x, n)
        address = y.address
        del y, m, again
        gc.collect()
        proxy.proxy_forget()
        assert session(a, b)[0].address == address and called("cuMemAlloc_v2") == 0


def unaligned_gpu_arrays_are_copied_there(path):
    with runtime.load(path) as session:
        x, n = inputs()
        a, b = Array(session, x, offset=4), Array(session, n, offset=8)
        y, m = Array(session, x, offset=16), Array(session, n)
        proxy.proxy_forget()
        session(a, b, out=(y, m))
        assert called("cuMemcpyAsync") == 3
        check((fetch(session._instance, y.block.address + 16, x), m.array.numpy()), x, n)


def runs_in_the_callers_stream(path):
    """Without waiting; whatever the session does next waits for it, and so does who takes an output."""
    with runtime.load(path) as session:
        x, n = inputs()
        mine, theirs = Stream(), Stream()
        a, b, c = Array(session, x), Array(session, n), Array(session, x)
        proxy.proxy_forget()
        y, m = session(a, b, stream=mine)
        assert a.streams == [mine.cuda_stream] and called("cuStreamSynchronize") == called("cuEventSynchronize") == 0
        other, number = inputs(2)
        check(session(other, number), other, number)  # after the other: the arena is one
        check((y.numpy(), m.numpy()), x, n)

        proxy.proxy_forget()
        y, m = session(a, b, stream=mine)
        capsule = y.__dlpack__(stream=theirs.cuda_stream)
        assert called("cuStreamSynchronize") == 0
        theirs.copy(c.block.address, y.address, x.nbytes)
        theirs.synchronize()
        check((fetch(session._instance, c.block.address, x), n + 1), x, n)
        del capsule

        y, m = session(a, b, stream=mine)
        y2, m2 = session(Array(session, other), b, stream=theirs)
        theirs.synchronize()
        check((y.numpy(), m.numpy()), x, n)
        check((y2.numpy(), m2.numpy()), other, n)
        y, m = session(a, b, stream=0)  # the default stream
        assert a.streams[-1] == 1
        check((y.numpy(), m.numpy()), x, n)
        session(a, b, stream=mine.cuda_stream)
        for stream in (mine, theirs):
            stream.close()


def outputs_live_as_long_as_they_are_used(path):
    """Exported, they outlive the array, the session and, where nobody takes the capsule, the capsule."""
    session = runtime.load(path)
    x, n = inputs()
    y, m = session(Array(session, x), Array(session, n))
    assert y.__dlpack_device__() == (2, 0)
    capsule = y.__dlpack__(max_version=(1, 0), dl_device=(2, 0), copy=False)
    tensor, instance = tensor_in(capsule), session._instance
    assert tuple(tensor.shape[:2]) == x.shape
    assert (tensor.code, tensor.bits, tensor.lanes, tensor.byte_offset) == (2, 32, 1, 0)
    session.close()
    del session, y, m
    gc.collect()
    assert proxy.proxy_live() > 0
    check((fetch(instance, tensor.data, x), n + 1), x, n)
    del tensor, capsule
    gc.collect()
    assert proxy.proxy_live() == 0


def consumers_delete_what_they_took(path):
    """NumPy takes the capsule over, which says that the memory is the host's."""

    class Taken:
        def __init__(self, array):
            self.array = array

        def __dlpack_device__(self):
            return 1, 0

        def __dlpack__(self, *, stream=None, **_):
            capsule = self.array.__dlpack__(stream=-1)
            tensor_in(capsule).device_type = 1
            return capsule

    with runtime.load(path) as session:
        x, n = inputs()
        y, m = session(Array(session, x), Array(session, n))
        taken, address = np.from_dlpack(Taken(y)), y.address
        del y, m
        gc.collect()
        y, _ = session(Array(session, x + 1), Array(session, n))
        assert y.address != address  # still in use
        check((fetch(session._instance, taken.ctypes.data, x), n + 1), x, n)
        with contextlib.suppress(BufferError):
            y.__dlpack__(copy=True)
            raise AssertionError("copied")


def instances_share_code_and_weights(path):
    with runtime.load(path) as first:
        before = called("cuMemAlloc_v2")
        with runtime.load(path) as second, runtime.load(path, device="cuda:1") as third:
            assert called("cuModuleLoadDataEx") == 2 and called("cuMemAlloc_v2") == before + 3
            for seed, session in enumerate((first, second, third, first)):
                x, n = inputs(seed)
                check(session(x, n), x, n)
            x, n = inputs(7)
            first.write(0, x)
            first.run_steps(0, 1)
            second(*inputs(8))
            np.testing.assert_allclose(first.read(4), x * (2 * weights()) + 1, rtol=1e-5, atol=1e-6)
        x, n = inputs(5)
        check(first(x, n), x, n)


def sessions_in_threads(path):
    failures = []

    def work(seed):
        try:
            for round in range(5):
                with runtime.load(path, device=f"cuda:{seed % 2}") as session:
                    for i in range(20):
                        x, n = inputs(seed * 1000 + round * 100 + i)
                        check(session(x, n), x, n)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures, failures


def a_device_like_any_other(path):
    """The parity check's view of it."""
    x, n = inputs()
    with runtime.open_device(path, "cuda:1") as device:
        check(device.run((x, n)), x, n)
        device.write(0, x)
        device.write(1, n)
        device.run_steps(0, 3)
        check((device.read(6), device.read(7)), x, n)
        assert len(device.bench(2)) == 2
        device.set_threads(2)


if __name__ == "__main__":
    main(globals())
