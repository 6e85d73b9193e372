"""The errors that bnsurgery raises for mistakes of the caller and for bad inputs, and its one warning category."""


class BNSurgeryError(Exception):
    """Base of the errors below: `except BNSurgeryError` catches them all."""


class UntraceableModelError(BNSurgeryError):
    """The forward pass cannot be followed symbolically; the message names the line and what stops it."""


class NoSitesError(BNSurgeryError):
    """No layer of the model can or may get a BatchNorm; the message lists the reasons."""


class CalibrationError(BNSurgeryError):
    """Statistics cannot be measured: there is no data, or the network fails on it."""


class FoldError(BNSurgeryError):
    """A BatchNorm cannot be folded into a neighbouring layer without changing the function."""


class ExportError(BNSurgeryError):
    """A format cannot hold the network, or the written file computes something else."""


class NonFiniteError(CalibrationError):
    """The measured activations contain NaN or infinity."""


class CheckpointError(BNSurgeryError):
    """A checkpoint or weights file is damaged, hostile or of another model, or cannot be written."""


class ArchitectureError(BNSurgeryError):
    """An architecture name is unknown, or names a network that is normalized already."""


class DataError(BNSurgeryError):
    """Images are missing, damaged or unusable."""


class BNSurgeryWarning(UserWarning):
    """A finding that does not stop the work, such as dead channels."""


def printable(text: str, longest: int = 100) -> str:
    """Untrusted text for a message: control characters are escaped, and at most `longest` characters are kept."""
    short = text if len(text) <= longest else f"{text[:longest]}..."
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in short)


def is_utf8(name: str) -> bool:
    """Whether a file's name is UTF-8, as safetensors requires. Python decodes other bytes to lone surrogates."""
    return not any("\ud800" <= c <= "\udfff" for c in name)


def shown(value: object) -> str:
    """An untrusted value for a message: text is quoted, and all is printable and short."""
    if isinstance(value, str):
        return f"'{printable(value)}'"
    try:
        return printable(repr(value))
    except (ValueError, RecursionError):  # thousands of digits, or of brackets
        return f"a {type(value).__name__}"
