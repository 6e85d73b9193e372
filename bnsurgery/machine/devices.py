"""Torch's devices, their abilities and their random states, by the functions that CUDA, MPS, XPU and others share."""

from contextlib import AbstractContextManager

import torch
from torch import get_device_module

from bnsurgery.errors import BNSurgeryError, printable

CPU = torch.device("cpu")
# Whether a kind of device computes in float64. Other kinds are tried once: some Intel GPUs cannot.
_FLOAT64 = {"cpu": True, "cuda": True, "meta": True, "mps": False}


def device(name: str) -> torch.device:
    """The device called `name`, such as "cpu", "cuda", "cuda:1", "mps" or "xpu".

    Raises:
        BNSurgeryError: torch finds no such device; the message lists those that it finds.
    """
    try:
        found = torch.device(name)
        module = get_device_module(found)
        # Neither call starts the device or takes memory on it.
        if module.is_available() and (found.index or 0) < module.device_count():
            return found
    except (RuntimeError, AttributeError):  # not the name of a device, or of none that this torch knows
        pass
    there = ", ".join(available())
    raise BNSurgeryError(f"device '{printable(name)}': torch finds none here. Use one that it finds: {there}")


def available() -> list[str]:
    """The names of the devices that torch finds."""
    kind = _accelerator()
    count = 0 if kind is None else torch.accelerator.device_count()
    return ["cpu", *([str(kind)] if count == 1 else [f"{kind}:{index}" for index in range(count)])]


def automatic() -> torch.device:
    """CUDA if available, else the CPU. Other accelerators are untested and have to be named."""
    return torch.device("cuda") if torch.cuda.is_available() else CPU


def takes_float64(device: torch.device) -> bool:
    """Whether `device` computes in float64."""
    kind = device.type
    if kind not in _FLOAT64:
        try:
            _FLOAT64[kind] = torch.ones(1, dtype=torch.float64, device=device).add_(1).cpu().item() == 2
        except (TypeError, RuntimeError):
            _FLOAT64[kind] = False
    return _FLOAT64[kind]


def widest(device: torch.device) -> torch.dtype:
    """Float64, or float32 on a device without it."""
    return torch.float64 if takes_float64(device) else torch.float32


def takes_bfloat16(device: torch.device) -> bool:
    """Whether an accelerator computes in bfloat16, according to torch."""
    return device.type != "cpu" and bool(getattr(get_device_module(device), "is_bf16_supported", bool)())


def failed(error: BaseException) -> bool:
    """Whether `error` means that a device failed, so that no further call to it works."""
    kind = getattr(torch, "AcceleratorError", None)  # torch 2.8; before that a RuntimeError like any other
    return isinstance(error, kind) if kind else isinstance(error, RuntimeError) and "CUDA error" in str(error)


def synchronize(device: torch.device) -> None:
    """Wait until `device` has finished its work."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def random_state(device: torch.device) -> torch.Tensor:
    """The state of the generator that dropout draws from on `device`."""
    return torch.get_rng_state() if device.type == "cpu" else get_device_module(device).get_rng_state(device)


def set_random_state(device: torch.device, state: torch.Tensor) -> None:
    """Restore what `random_state` returned."""
    if device.type == "cpu":
        torch.set_rng_state(state)
    else:
        get_device_module(device).set_rng_state(state, device)


def keeping_random(on: torch.device | None = None) -> AbstractContextManager[None]:
    """Restore torch's random states on exit: the CPU's, and that of `on` or of all accelerators in use."""
    devices = _in_use() if on is None else [device for device in (on,) if device.type != "cpu"]
    return torch.random.fork_rng(devices, device_type=devices[0].type if devices else "cuda")


def _in_use() -> list[torch.device]:
    """The accelerators, if one has been used: any question to an idle one would start it."""
    kind = _accelerator()
    if kind is None:
        return []
    module = get_device_module(kind)
    used = getattr(module, "is_initialized", module.is_available)()
    return [torch.device(kind, index) for index in range(module.device_count())] if used else []


def _accelerator() -> str | None:
    """The type of accelerator that this torch was built for, available or not."""
    try:
        found = torch.accelerator.current_accelerator()
    except RuntimeError:  # torch 2.6, which gives None from 2.7 on
        return None
    return None if found is None else found.type
