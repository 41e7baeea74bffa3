"""Loads and runs artifacts. Needs NumPy and the standard library only.

`load` gives a `Session`, to be called with arrays; `open_device` runs an artifact elsewhere; `read_manifest` tells what
it is. Every error of theirs is a `BnnccError` with one line.
"""

from bnncc.runtime.container import read_manifest
from bnncc.runtime.device import Device, open_device
from bnncc.runtime.errors import (
    ArtifactError,
    BnnccError,
    DeviceError,
    ExecutionError,
    InputError,
    LinkError,
    UnsupportedMachineError,
)
from bnncc.runtime.gpu import DeviceArray
from bnncc.runtime.manifest import Manifest
from bnncc.runtime.session import Session, load

__all__ = [
    "ArtifactError",
    "BnnccError",
    "Device",
    "DeviceArray",
    "DeviceError",
    "ExecutionError",
    "InputError",
    "LinkError",
    "Manifest",
    "Session",
    "UnsupportedMachineError",
    "load",
    "open_device",
    "read_manifest",
]
