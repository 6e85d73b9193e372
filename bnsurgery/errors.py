"""Every error that bnsurgery raises for a caller's mistake or a bad input, and its one warning category."""


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
