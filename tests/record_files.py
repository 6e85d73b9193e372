"""Checkpoints with a changed record, for tests of what a file may claim."""

import hashlib
import json
from dataclasses import replace

from safetensors import safe_open
from safetensors.torch import load_file, save_file


def rewrite(path, change):
    """Change the record in a file's metadata, with a matching digest: only the record's own checks are left."""
    with safe_open(path, framework="pt") as file:
        data = json.loads(file.metadata()["bnsurgery"].partition(" ")[2])
    change(data)
    text = json.dumps(data)
    save_file(load_file(path), path, {"bnsurgery": f"{hashlib.sha256(text.encode()).hexdigest()} {text}"})


def old_format(data, version):
    """As formats 1 to 3 had it: plan and options by their fields, and every site with what was planned of it."""
    plan, options = data.pop("plan"), data.pop("options")
    data.update(options, format_version=version)
    data.update({name: plan[name] for name in ("model", "placement", "layers", "head")})
    for site, planned in zip(data["sites"], plan["sites"], strict=True):
        site["site"] = planned
    del data["frozen_at_save"]


def in_old_format(done):
    """A record as it comes back from these formats, which did not say why other layers got no BatchNorm."""
    return replace(done, plan=replace(done.plan, skipped=(), lrn=()))
