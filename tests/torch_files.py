"""Files of torch.save as bytes, for tests that damage them, give them other names or have them run code."""

import io
import os
import zipfile

import torch

STATE = {"0.weight": torch.arange(6.0).view(2, 3), "0.bias": torch.tensor([-1.0, 2.5])}


class Evil:
    """Unpickled without restrictions, it makes a folder."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def assert_is_state(state, expected=STATE):
    assert state.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(state[name], tensor), name


def to_torch(thing, legacy=False):
    buffer = io.BytesIO()
    torch.save(thing, buffer, _use_new_zipfile_serialization=not legacy)
    return buffer.getvalue()


def deflated(archive):
    buffer = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(archive)) as old, zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as new:
        for name in old.namelist():
            new.writestr(zipfile.ZipInfo(name), old.read(name), zipfile.ZIP_DEFLATED)  # no time: the same bytes again
    return buffer.getvalue()
