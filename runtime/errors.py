"""Errors a user can cause. Each carries one line: what is wrong, where, what is supported, what to do next."""


class BnnccError(Exception):
    """Base of every error that is the user's to fix; the command line prints it as one line without a traceback."""


class ArtifactError(BnnccError):
    """The file is missing, is no artifact, or is not as the compiler wrote it."""


class UnsupportedMachineError(BnnccError):
    """The artifact is for another architecture, or needs a CPU feature that this machine lacks."""


class InputError(BnnccError):
    """An argument does not fit: an input's name, shape or dtype, a number of threads, a tensor id."""


class ExecutionError(BnnccError):
    """A kernel or the driver reported a failure."""


class DeviceError(BnnccError):
    """The place to run on is unknown, absent, or stopped answering."""


class LinkError(BnnccError):
    """The artifact could not be linked."""
