"""Reports as `make bench` writes them, with figures made up."""

LIMITS = {
    "arithmetic": {
        isa: {
            "binary": {"gops": binary, "mix": mix, "mixes": {}},
            "float": {"gops": 100.0, "mix": "float_fma", "mixes": {}},
            "int8": {"gops": 400.0, "mix": "int8_vpdpbusd", "mixes": {}},
        }
        for isa, binary, mix in (
            ("x86-64-v2", 500.0, "binary_popcnt"),
            ("x86-64-v3", 1000.0, "binary_carry_save_2"),
            ("native", 5700.0, "binary_counted"),
        )
    },
    "memory": {
        "L1": {"bytes": 32 << 10, "read_gbs": 200.0, "copy_gbs": 150.0},
        "L2": {"bytes": 1 << 20, "read_gbs": 80.0, "copy_gbs": 100.0},
        "L3": {"bytes": 32 << 20, "read_gbs": 50.0, "copy_gbs": 40.0},
        "memory": {"bytes": None, "read_gbs": 10.0, "copy_gbs": 8.0},
    },
}


def tensor(index, size, space="arena", offset=0):
    return {"id": index, "name": f"t{index}", "shape": [size], "dtype": "uint8", "space": space, "offset": offset}


def step(op, layers, args, outputs=1):
    return {"kernel": op, "op": op, "args": args, "outputs": outputs, "layers": layers, "exact": True}


def layer(path, macs, bits=1):
    return {
        "path": path, "op": "conv", "output_shape": [1], "activation_bits": bits, "weight_bits": bits, "macs": macs,
        "weight_bytes": 0,
    }  # fmt: skip


def version(steps, tensors, layers, *, arena=0, weights=0):
    return {
        "steps": steps, "tensors": tensors, "layers": layers, "arena_bytes": arena, "weights_bytes": weights,
        "persistent_bytes": 0,
    }  # fmt: skip


def report():
    """One item in every section; every claim holds, by little."""
    against = {"ORT fp32": 12.5, "ORT int8": 4.3, "torch fp32": 13.0, "LCE default": 60.0, "LCE best": 15.5}
    times = {"bnncc": 1.0, **against}
    row = {
        "step": 0, "op": "xnor_conv2d", "layers": ["a"], "macs": {"1×1 bits": 10**6}, "activation_bytes": 1000,
        "weight_bytes": 100, "us": 2.0, "bound_us": 1.5, "bound_by": "compute", "moves": False,
    }  # fmt: skip
    kernel = {"us": 10.0, "gops": 5200.0, "limit_gops": 5700.0, "limit_by": "binary_counted", "share_of_limit": 0.91}
    return {
        "when": "2026-01-01T00:00:00+00:00",
        "machine": {"processor": "abacus"},
        "limits": LIMITS,
        "kernels": {
            "3×3, 28²×128": {
                "native": kernel,
                "x86-64-v3": {**kernel, "gops": 1101.0, "limit_gops": 1264.0, "share_of_limit": 0.871},
                "x86-64-v2": {**kernel, "gops": 551.0, "limit_gops": 636.0, "share_of_limit": 0.866},
            },
            "1×1, 28²×128": {"native": {**kernel, "share_of_limit": 0.71}},
        },
        "layers": {
            "3×3, 64→64 at 56²": {
                "median_ms": {"bnncc": 2.0, "ORT fp32": 2.2, "torch fp32": 2.4},
                "times_faster": {"ORT fp32": 1.1, "torch fp32": 1.2},
                "kernel_us": 1900.0, "gflops": 91.0, "gb_per_s": 1.0, "bound_by": "compute", "share_of_bound": 0.91,
                "steps": [row],
            },
        },
        "convolutions": {
            "28²×128": {
                "median_ms": dict(times), "times_faster": dict(against), "missing": {},
                "gops": 3000.0, "share_of_limit": 0.6,
            }
        },
        "networks": {
            "QuickNet": {
                "median_ms": dict(times), "times_faster": dict(against), "missing": {},
                "largest_difference_from_eager": 0.0,
                "roofline": {
                    "ms": 0.8, "ms_of_layers_that_multiply": 0.7, "share": 0.8, "share_by_layers_that_multiply": 0.7
                },
                "steps": [row],
                "threads": {"wall_ms": {"1": 1.0, "2": 0.5}, "ratio": 1.9},
                "memory": {
                    "artifact_bytes": 4_390_000, "weights_bytes": 4_000_000, "arena_bytes": 1_040_000,
                    "alive_bytes": 1_000_000, "resident_bytes": 15_000_000,
                },
                "compile": {"seconds": 20.0, "cpu_seconds": 25.0, "peak_mb": 900.0, "second_seconds": 4.0},
            }
        },
    }  # fmt: skip
