"""The rest of what test_driver.py runs: which GPU is taken, what is refused, and what a failure leaves behind."""

import itertools
import os

from driver_tools import Array, called, check, gpu, inputs, main, proxy, refusal, same

from bnncc import runtime
from bnncc.runtime.errors import ExecutionError, InputError


def chooses_the_gpu(path):
    with runtime.load(path, device="cuda:1") as session:
        same(session.device, "cuda:1")
    for text, name in (("1", "cuda:1"), ("cuda:1", "cuda:1"), ("", "cuda:0")):
        os.environ["BNNCC_DEVICE"] = text
        for device in (None, "cuda"):
            with runtime.load(path, device=device) as session:
                same(session.device, name)
    with runtime.load(path, device="cuda:0") as session:
        same(session.device, "cuda:0")
    os.environ["BNNCC_DEVICE"] = "gpu"
    same(refusal(path), "tiny: BNNCC_DEVICE is 'gpu'; a GPU is expected, as in 0 or cuda:0")
    same(refusal(path, "cuda:2"), "tiny: there is no cuda:2; this process sees 2 GPUs, from cuda:0")
    try:
        runtime.load(path, device="cpu")
    except InputError as error:
        assert "its device is cuda" in str(error)
    else:
        raise AssertionError("it runs on the CPU")


def refuses_gpu_arrays_that_do_not_fit(path):
    with runtime.load(path) as session:
        x, n = inputs()
        a, b = Array(session, x), Array(session, n)
        for arrays, out, message in (
            ((Array(session, x, device=1), b), None, "input 'x' lies on cuda:1, and the session runs on cuda:0"),
            ((a, n), None, "input 'n' lies in the host's memory, and an input on cuda:0"),
            ((Array(session, x[:3]), b), None, "input 'x' has shape (3, 64), the model was compiled for (6, 64)"),
            ((a, Array(session, n.astype("i4"))), None, "input 'n' has dtype int32, the model takes int64"),
            ((Array(session, x, strides=(1, 6)), b), None, "input 'x' is not contiguous"),
            ((a,), None, "the model has 2 input(s) (x, n), 1 given"),
            ((a, b), (a,), "the model has 2 output(s) (y, m), 1 given"),
            ((a, b), (x, n), "output 'y' lies in the host's memory"),
            ((a, b), (a, a), "output 'm' has shape (6, 64)"),
        ):
            try:
                session(*arrays, out=out)
            except InputError as error:
                assert message in str(error) and "\n" not in str(error), error
            else:
                raise AssertionError(message)
        try:
            session(a, b, stream="mine")
        except InputError as error:
            same(str(error), "stream is 'mine'; an integer (a CUstream) or a torch.cuda.Stream is expected")
        else:
            raise AssertionError("a text was taken for a stream")


def says_what_is_missing(path):
    where = "cuda:0 (Emulated GPU, sm_90)"
    gpu(devices=0)
    same(
        refusal(path),
        "tiny: no GPU can be used: CUDA_ERROR_NO_DEVICE (no CUDA-capable device is detected); see what nvidia-smi "
        "lists and whether CUDA_VISIBLE_DEVICES hides it",
    )
    gpu(driver=12040)
    same(
        refusal(path),
        "tiny: the NVIDIA driver is too old: it supports CUDA 12.4, the artifact needs 13.0; update it, or compile "
        "with an older CUDA compiler",
    )
    gpu(capability=89)
    same(
        refusal(path),
        "tiny: compiled for cuda-sm_90, which cuda:0 (Emulated GPU, sm_89) cannot run; compile with -t cuda-sm_89",
    )
    gpu(memory=3000)
    # The arena (3136), the persistent space (256), the homes (1536, 24, twice), each a multiple of 256.
    needed = 3328 + 256 + 2 * (1536 + 256)
    same(
        refusal(path),
        f"tiny: out of memory on {where}: an instance takes {needed} bytes, 2744 of 3000 are free; take a smaller "
        "batch, or end what else uses the GPU",
    )
    gpu(memory=100)
    assert "the weights take 256 bytes, 100 of 100 are free" in refusal(path)
    gpu()
    for function, code, line in (
        (
            b"cuFuncSetAttribute", 1,
            f"giving kernel affine_kernel its 98304 bytes of shared memory on {where} failed: "
            "CUDA_ERROR_INVALID_VALUE (invalid argument)",
        ),
        (
            b"cuModuleLoadDataEx", 200,
            f"the NVIDIA driver refuses the kernels for {where}: CUDA_ERROR_INVALID_IMAGE (device kernel image is "
            "invalid); update it, or compile with -t cuda-sm_90",
        ),
        (
            b"cuModuleLoadDataEx", 2,
            f"loading the kernels on {where} failed: CUDA_ERROR_OUT_OF_MEMORY (out of memory); take a smaller batch, "
            "or end what else uses the GPU",
        ),
        (
            b"cuCtxPushCurrent_v2", 3,
            f"entering the context on {where} failed: CUDA_ERROR_NOT_INITIALIZED (initialization error); CUDA does not "
            "survive a fork, start the process anew (in Python: multiprocessing's 'spawn')",
        ),
    ):  # fmt: skip
        proxy.proxy_fail(function, 1, code)
        same(refusal(path), f"tiny: {line}")
    runtime.load(path).close()


def later_gpus_compile_the_ptx(path):
    x, n = inputs()
    gpu(capability=93)
    with runtime.load(path) as session:
        same(called("cuModuleLoadDataEx"), 1)
        check(session(x, n), x, n)
    proxy.proxy_forget()
    proxy.proxy_fail(b"cuModuleLoadDataEx", 1, 209)  # no machine code for this one, although its number fits
    with runtime.load(path) as session:
        same(called("cuModuleLoadDataEx"), 2)
    proxy.proxy_forget()
    gpu(capability=120)
    with runtime.load(path) as session:
        same(called("cuModuleLoadDataEx"), 1)
        check(session(x, n), x, n)
    gpu(capability=120, ptx=0)
    same(
        refusal(path),
        "tiny: the NVIDIA driver refuses the kernels for cuda:0 (Emulated GPU, sm_120): "
        "CUDA_ERROR_UNSUPPORTED_PTX_VERSION (the provided PTX was compiled with an unsupported toolchain.): "
        "emulated log; update it, or compile with -t cuda-sm_120",
    )


def an_architecture_of_its_own_runs_nowhere_else(path):
    """Compiled for sm_90a."""
    runtime.load(path).close()
    gpu(capability=100)
    line = refusal(path)
    assert line.startswith("tiny: compiled for cuda-sm_90, which cuda:0 (Emulated GPU, sm_100) cannot run"), line


def a_kernel_that_fails_is_one_line(path):
    session = runtime.load(path)
    gpu(fail_launch=3)  # the init step is one
    try:
        session(*inputs())
    except ExecutionError as error:
        same(
            str(error),
            "tiny: running the network on cuda:0 (Emulated GPU, sm_90) failed: CUDA_ERROR_LAUNCH_FAILED (unspecified "
            "launch failure); nothing more can run on this GPU in this process, start a new one",
        )
    else:
        raise AssertionError("it ran")
    same(proxy.proxy_depth(), 0)
    session.close()
    os._exit(0)  # the context is lost, and with it what it held


#: Functions that free: where they fail, all the driver can do is go on.
FREEING = {
    "cuCtxPopCurrent_v2", "cuMemFree_v2", "cuMemFreeHost", "cuModuleUnload", "cuDevicePrimaryCtxRelease_v2",
    "cuStreamDestroy_v2", "cuEventDestroy_v2", "cuGraphDestroy", "cuGraphExecDestroy",
}  # fmt: skip


def failing_calls():
    """Every function that was called, and the number of each call, as failures to be made."""
    made = proxy.proxy_calls().decode().split()
    made = [function for function in made if function not in FREEING]
    return [(function, 1 + made[:at].count(function)) for at, function in enumerate(made)]


def a_failure_while_loading_leaves_nothing(path):
    """Whatever function fails, at whichever call: one line, nothing left, no context current."""
    session = runtime.load(path)
    calls = failing_calls()
    session.close()
    same(proxy.proxy_live(), 0)
    assert len({function for function, _ in calls}) >= 20
    for function, nth in calls:
        proxy.proxy_fail(function.encode(), nth, 999)
        line = refusal(path)
        assert "CUDA error 999" in line and "\n" not in line, (function, nth, line)
    runtime.load(path).close()


def a_failure_while_running_is_one_line(path):
    """The same for runs, after which the next one works."""
    seeds = itertools.count()  # so that no result of an earlier run is right
    with runtime.load(path) as session:
        arrays, outputs = ([Array(session, value) for value in inputs()] for _ in range(2))

        def on_host():
            x, n = inputs(next(seeds))
            check(session(x, n), x, n)

        def on_gpu():
            x, n = inputs(next(seeds))
            for array, value in zip(arrays, (x, n), strict=True):
                array.set(value)
            session(*arrays, out=outputs)
            check([output.array.numpy() for output in outputs], x, n)

        for run in (on_host, on_gpu, lambda: session.run_steps(0, 3), lambda: session.run_steps(1, 1)):
            on_host()
            on_gpu()
            proxy.proxy_forget()
            run()
            # Memory that CUDA does not say it knows is copied through memory that it does.
            for function, nth in set(failing_calls()) - {("cuPointerGetAttribute", at) for at in range(9)}:
                proxy.proxy_fail(function.encode(), nth, 999)
                try:
                    run()
                except ExecutionError as error:
                    assert "CUDA error 999" in str(error), (function, nth, error)
                else:
                    # What changes in the graph depends on the run before: there may be fewer calls this time.
                    assert function == "cuGraphExecKernelNodeSetParams", (function, nth)
                proxy.proxy_fail(b"", 0, 0)
                same(proxy.proxy_depth(), 0)
                run()  # on the same arrays: what failed to change in the graph must change now
                on_host()
                on_gpu()


if __name__ == "__main__":
    main(globals())
