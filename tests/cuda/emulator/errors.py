"""What the emulator raises."""


class EmulationError(Exception):
    """The kernel is wrong, or does what the emulator does not know."""
