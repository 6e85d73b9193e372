"""Checkpoints with a changed record, for tests of what a file may claim."""

import hashlib
import json

from safetensors import safe_open
from safetensors.torch import load_file, save_file


def rewrite(path, change):
    """Change the record in a file's metadata, with a matching digest: only the record's own checks are left."""
    with safe_open(path, framework="pt") as file:
        data = json.loads(file.metadata()["bnsurgery"].partition(" ")[2])
    change(data)
    text = json.dumps(data)
    save_file(load_file(path), path, {"bnsurgery": f"{hashlib.sha256(text.encode()).hexdigest()} {text}"})
