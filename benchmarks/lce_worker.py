"""Larq Compute Engine in a process of its own, by `benchmarks.lce`; runs in that peer's virtual environment.

One request in JSON to a line on the standard input, one answer to each on the standard output:

    {"model": NAME, "file": PATH}                 builds and converts the model, if the file is not there yet
    {"load": PATH, "options": {…}}                → {"loaded": N}
    {"run": N, "seconds": S}                      → {"times": [seconds of CPU time of each run, after one]}

NAME is a class of larq-zoo, which gets random weights, or "SIZE×CHANNELS", a single binary 3×3 convolution.
"""

import json
import os
import sys
import time
from pathlib import Path

os.environ |= {"TF_USE_LEGACY_KERAS": "1", "TF_CPP_MIN_LOG_LEVEL": "3", "CUDA_VISIBLE_DEVICES": ""}

answers = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)  # whatever the libraries print is no answer


def convert(name: str) -> bytes:
    import larq
    import larq_compute_engine
    import tensorflow as tf

    if "×" in name:
        size, channels = map(int, name.split("×"))
        layer = larq.layers.QuantConv2D(
            channels, 3, padding="same", pad_values=1.0, use_bias=False,
            input_quantizer="ste_sign", kernel_quantizer="ste_sign",
        )  # fmt: skip
        model = tf.keras.Sequential([tf.keras.layers.Input((size, size, channels), batch_size=1), layer])
    else:
        import larq_zoo

        module = larq_zoo.sota if hasattr(larq_zoo.sota, name) else larq_zoo.literature
        model = getattr(module, name)(weights=None)
    return larq_compute_engine.convert_keras_model(model)


def load(file: str, options: dict):
    """A function that runs the model of a file once on one thread."""
    import numpy as np
    from larq_compute_engine.tflite.python.interpreter import Interpreter

    interpreter = Interpreter(Path(file).read_bytes(), num_threads=1, **options)
    shape = [1 if extent in (None, -1) else extent for extent in interpreter.input_shapes[0]]
    x = np.random.default_rng(0).standard_normal(shape).astype("float32")
    return lambda: interpreter.predict(x)


def burst(run, seconds: float) -> list:
    run()
    times, end = [], time.perf_counter() + seconds
    while not times or time.perf_counter() < end:
        start = time.process_time()
        run()
        times.append(time.process_time() - start)
    return times


def answer(request: dict, loaded: list) -> dict:
    if "model" in request:
        path = Path(request["file"])
        if not path.exists():
            part = path.with_suffix(".part")
            part.write_bytes(convert(request["model"]))
            part.rename(path)
        return {}
    if "load" in request:
        loaded.append(load(request["load"], request["options"]))
        return {"loaded": len(loaded) - 1}
    return {"times": burst(loaded[request["run"]], request["seconds"])}


def main() -> None:
    loaded: list = []
    for line in sys.stdin:
        try:
            reply = answer(json.loads(line), loaded)
        except Exception as error:
            reply = {"error": f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}"}
        print(json.dumps(reply), file=answers, flush=True)


if __name__ == "__main__":
    main()
