"""Where to compute: which devices there are, what they can do, and their random numbers.

Torch's generic names for accelerators are used throughout (`torch.accelerator`, `torch.get_device_module`), which CUDA,
MPS, XPU and others share.
"""

from contextlib import AbstractContextManager
from types import ModuleType

import torch

from bnsurgery.errors import BNSurgeryError, printable

CPU = torch.device("cpu")
# Whether a kind of device computes in float64. Those that do not stand here are asked, once: some GPUs of Intel's.
_FLOAT64 = {"cpu": True, "cuda": True, "meta": True, "mps": False}


def device(name: str) -> torch.device:
    """The device called `name`, made sure of: "cpu", "cuda", "cuda:1", "mps", "xpu", ...

    Raises:
        BNSurgeryError: there is no such device here; the message says which there are.
    """
    try:
        found = torch.device(name)
        module = _module(found)
        # Neither question starts the device or takes memory on it.
        there = module.is_available() and (found.index or 0) < module.device_count()
    except (RuntimeError, AttributeError):  # no name of a device, or of one that this torch does not know
        there = False
    if not there:
        raise BNSurgeryError(
            f"device '{printable(name)}': torch finds none here. Use one that it finds: {', '.join(available())}"
        )
    return found


def available() -> list[str]:
    """The names of the devices that there are."""
    kind = _accelerator()
    count = 0 if kind is None else torch.accelerator.device_count()
    return ["cpu", *([str(kind)] if count == 1 else [f"{kind}:{index}" for index in range(count)])]


def automatic() -> torch.device:
    """A CUDA GPU where there is one, else the CPU. Other accelerators, never tried, want to be named."""
    return torch.device("cuda") if torch.cuda.is_available() else CPU


def takes_float64(device: torch.device) -> bool:
    """Whether there can be float64 tensors on it, and arithmetic with them."""
    kind = device.type
    if kind not in _FLOAT64:
        try:
            _FLOAT64[kind] = torch.ones(1, dtype=torch.float64, device=device).add_(1).cpu().item() == 2
        except (TypeError, RuntimeError):
            _FLOAT64[kind] = False
    return _FLOAT64[kind]


def widest(device: torch.device) -> torch.dtype:
    """Float64, or float32 where the device has no other."""
    return torch.float64 if takes_float64(device) else torch.float32


def claims_identity(device: torch.device) -> bool:
    """Whether insertion must keep every bit there, as on the CPU and on CUDA, with Triton or without.

    How other devices round has never been looked at.
    """
    return device.type in ("cpu", "cuda", "meta")


def takes_bfloat16(device: torch.device) -> bool:
    """Whether an accelerator says that it computes in bfloat16."""
    asked = None if device.type == "cpu" else getattr(_module(device), "is_bf16_supported", None)
    return asked is not None and bool(asked())


def failed(error: BaseException) -> bool:
    """Whether a device failed, so that no further call to it will work."""
    kind = getattr(torch, "AcceleratorError", None)  # torch 2.8; before that a RuntimeError like any other
    return isinstance(error, kind) if kind else isinstance(error, RuntimeError) and "CUDA error" in str(error)


def synchronize(device: torch.device) -> None:
    """Wait until it has done what it was given."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def random_state(device: torch.device) -> torch.Tensor:
    """Of the generator that dropout draws from there."""
    state: torch.Tensor = torch.get_rng_state() if device.type == "cpu" else _module(device).get_rng_state(device)
    return state


def set_random_state(device: torch.device, state: torch.Tensor) -> None:
    """Put back what `random_state` gave."""
    if device.type == "cpu":
        torch.set_rng_state(state)
    else:
        _module(device).set_rng_state(state, device)


def keeping_random(on: torch.device | None = None) -> AbstractContextManager[None]:
    """Torch's random numbers are afterwards what they were: the CPU's, and those of `on` or all accelerators in use."""
    devices = _in_use() if on is None else [device for device in (on,) if device.type != "cpu"]
    return torch.random.fork_rng(devices, device_type=devices[0].type if devices else "cuda")


def _in_use() -> list[torch.device]:
    """The accelerators, where one has been used: to ask an idle one for anything would start it."""
    kind = _accelerator()
    module = None if kind is None else _module(torch.device(kind))
    if kind is None or module is None or not getattr(module, "is_initialized", module.is_available)():
        return []
    return [torch.device(kind, index) for index in range(module.device_count())]


def _accelerator() -> str | None:
    """The kind that this torch was built for, whether there is one or not."""
    try:
        found = torch.accelerator.current_accelerator()
    except RuntimeError:  # torch 2.6, which gives None from 2.7 on
        return None
    return None if found is None else found.type


def _module(device: torch.device) -> ModuleType:
    module: ModuleType = torch.get_device_module(device)
    return module
