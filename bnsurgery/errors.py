"""Every error that bnsurgery raises for a caller's mistake or a bad input, and its one warning category."""

_LONGEST = 100  # characters of a value in a message


class BNSurgeryError(Exception):
    """Base of all errors below: catch it to catch whatever this package refuses."""


class UntraceableModelError(BNSurgeryError):
    """The forward pass cannot be followed symbolically; the message names the construct and the line."""


class NoSitesError(BNSurgeryError):
    """No layer of the model can or may get a BatchNorm; the message lists the reasons."""


class CalibrationError(BNSurgeryError):
    """The calibration data, or what the network makes of it, cannot give statistics."""


class FoldError(BNSurgeryError):
    """A BatchNorm cannot be folded into a neighbouring layer without changing the function."""


class ExportError(BNSurgeryError):
    """A format has no place for the network, or what was written computes something else."""


class NonFiniteError(CalibrationError):
    """NaN or infinity where statistics were measured."""


class CheckpointError(BNSurgeryError):
    """A checkpoint or weights file is damaged, hostile, of another model, or cannot be written."""


class ArchitectureError(BNSurgeryError):
    """An architecture name is unknown, or names a network that is normalized already."""


class DataError(BNSurgeryError):
    """Images are missing, damaged or unusable."""


class BNSurgeryWarning(UserWarning):
    """Something worth knowing that does not stop the work, such as dead channels."""


def printable(text: str, longest: int = _LONGEST) -> str:
    """`text` from a file or its name, for people: nothing in it steers a terminal, and no more than `longest` of it."""
    short = text if len(text) <= longest else f"{text[:longest]}..."
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in short)


def is_utf8(name: str) -> bool:
    """Whether a file's name is UTF-8: safetensors opens no other."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def shown(value: object) -> str:
    """Any value from a file, for a message: text quoted, printable and short."""
    if isinstance(value, str):
        return f"'{printable(value)}'"
    try:
        return printable(repr(value))
    except (ValueError, RecursionError):  # thousands of digits, or of brackets
        return f"a {type(value).__name__}"
