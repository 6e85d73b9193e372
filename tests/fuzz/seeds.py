"""Write the corpus: `python -m tests.fuzz.seeds`. What fuzzing found is added to it by hand."""

import io
import json
import pickle
import struct
from argparse import Namespace
from dataclasses import asdict, replace
from pathlib import Path, PosixPath

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save as to_safetensors
from torch import nn

import bnsurgery
from bnsurgery.finetune import Config
from bnsurgery.finetune.comparison import Trial
from bnsurgery.finetune.datasets import Fingerprint
from bnsurgery.finetune.results import NormRow, Resolved, Row
from bnsurgery.images.preprocessing import Preprocessing
from bnsurgery.records.architectures import Architecture
from bnsurgery.records.record import Task, attach_record, record
from tests.torch_files import Evil, deflated, to_torch

from .networks import CORPUS, inserted, small

_ROW = Row(1.0, 6, 0.05, 1.2, 0.5, 1.1, 0.6, 900.0)
_NORM = NormRow(6, "features.1", 64, 2, 0.001, 0.5, 2.5)


def _saved(network: nn.Module) -> bytes:
    path = Path("saved.safetensors")
    bnsurgery.save(network, path, overwrite=True)
    data = path.read_bytes()
    path.unlink()
    return data


def _checkpoints() -> dict[str, bytes]:
    plain = inserted()
    tuned, named = inserted(), inserted()
    task = Task(("a", "b", "ü"), "4", Preprocessing(4, 4, 4, (0.5,), (0.25,), channels="grey"))
    attach_record(tuned, replace(record(tuned), task=task, provenance={"model": "os:system", "weights": "x"}))
    attach_record(named, replace(record(named), provenance={"image_size": 4, "normalize": "none"}))
    found = {
        "plain": _saved(plain),
        "tuned": _saved(tuned),
        "named": _saved(named),
        "post": _saved(inserted(placement="post-activation")),
        "absorbed": _saved(inserted(absorb_bias=True)),
        "fused": _saved(inserted(fuse_relu=True)),
        "no-record": to_safetensors(small().state_dict()),
        "long-header": struct.pack("<Q", 17 * 2**20) + b"{",
        "twice": struct.pack("<Q", 50) + b'{"a":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}'.ljust(50),
    }
    return found


def _weights() -> dict[str, bytes]:
    state = small().state_dict()
    views = torch.ones(2001)
    return {
        "zip": to_torch(state),
        "legacy": to_torch(state, legacy=True),
        "compressed": deflated(to_torch(state)),
        "safetensors": to_safetensors(state),
        "nested": to_torch({"epoch": 1, "state_dict": {f"module.{k}": v for k, v in state.items()}}),
        "beside": to_torch(
            {
                "args": Namespace(lr=0.1, data=PosixPath("x")),
                "accuracy": np.float64(0.5),
                "nets": {"b": {f"net.{k}": v for k, v in state.items()}, "d": {"net.0.weight": torch.ones(1)}},
            }
        ),
        "bomb": deflated(to_torch({"a": torch.zeros(2**19)})),
        "views": to_torch({f"{i}": views[1:] for i in range(150)}),
        "half": to_torch({"a": torch.ones(3).half(), "b": torch.ones(2, 2).double()}),
        "evil": to_torch(Evil("sentinel")),
        "evil-legacy": to_torch({"a": Evil("sentinel")}, legacy=True),
        "evil-pickle": pickle.dumps(Evil("sentinel")),
        "many-digits": to_torch({10**5000: torch.ones(1)}),
        "escape": to_torch({"\x1b[2J" + "k" * 500: torch.ones(1, dtype=torch.int8)}),
    }


def _images() -> dict[str, bytes]:
    found = {}
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (7, 9, 4), dtype=torch.uint8, generator=generator).numpy()
    rgba = Image.fromarray(pixels)
    for mode in ("RGB", "RGBA", "L", "LA", "P", "1", "I", "CMYK", "YCbCr", "F"):
        for kind in ("PNG", "JPEG", "WEBP", "TIFF"):
            buffer = io.BytesIO()
            try:
                rgba.convert("RGB").convert(mode).save(
                    buffer, kind, **({"progressive": mode == "L"} if kind == "JPEG" else {})
                )
            except (OSError, ValueError):
                continue
            found[f"{mode}.{kind.lower()}"] = buffer.getvalue()
    for kind in ("BMP", "DDS", "GIF", "JPEG2000", "PCX", "PPM", "SGI"):
        buffer = io.BytesIO()
        rgba.convert("RGB").save(buffer, kind)
        found[f"RGB.{kind.lower()}"] = buffer.getvalue()
    for compression in ("tiff_lzw", "tiff_deflate", "packbits", "jpeg"):
        buffer = io.BytesIO()
        rgba.convert("RGB").save(buffer, "TIFF", compression=compression)
        found[f"{compression}.tiff"] = buffer.getvalue()
    for kind in ("PNG", "WEBP", "GIF"):
        buffer = io.BytesIO()
        rgba.save(buffer, kind, save_all=True, append_images=[rgba.rotate(90), rgba])
        found[f"animated.{kind.lower()}"] = buffer.getvalue()
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    for kind in ("JPEG", "PNG"):
        buffer = io.BytesIO()
        rgba.convert("RGB").save(buffer, kind, exif=exif)
        found[f"turned.{kind.lower()}"] = buffer.getvalue()
    for name, size in (("bomb", (30_000, 10_000)), ("strip", (5000, 1)), ("wide", (2000, 1500))):
        buffer = io.BytesIO()
        Image.new("1", size).save(buffer, "PNG")
        found[f"{name}.png"] = buffer.getvalue()
    return found


def _arguments() -> dict[str, bytes]:
    few = "--image-size 32 --num-images 2 --batch-size 2"
    tiny = "--image-size 32 --batch-size 2 --num-workers 0"
    lines = {
        "insert": f"insert squeezenet1_1 --weights random {few} --data photos --quiet --force -o new.safetensors",
        "insert-file": f"insert squeezenet1_1 --weights evil.pt {few} --force --json",
        "plan": "plan squeezenet1_1 --image-size 32 --head --layers conv --dot plan.dot --force",
        "plan-file": "plan net.safetensors --json",
        "verify": f"verify net.safetensors --data photos {few} --json",
        "finetune": f"finetune net.safetensors --data photos --epochs 1 {tiny} --lr 0.1 --force",
        "finetune-file": f"finetune evil.pt --data photos --epochs 1 {tiny} --lr auto --quiet",
        "resume": "finetune --resume run --model os:system",
        "compare": f"compare net.safetensors --data photos --rates 0.1 --arms bn --seeds 1 --jobs 1 {tiny}",
        "report": "report run -o page.html --force",
        "report-file": f"report net.safetensors --data photos {few} -o page.html --force",
        "report-comparison": "report comparison.json --plot figures --force",
        "predict": "predict net.safetensors photo.png evil.png pipe loop --top 2 --device cpu",
        "fold": "fold net.safetensors -o folded.safetensors --force --quiet",
        "export": "export net.safetensors --to state-dict --image-size 32 --keep-bn -o out.pth --force",
        "archs": "archs --json",
        "help": "insert --help",
        "version": "--version",
    }
    return {name: line.replace(" ", "\0").encode() for name, line in lines.items()}


def _state() -> dict[str, object]:
    optimizer = {"state": {}, "param_groups": [{"lr": 0.05, "params": [0]}]}
    state = {
        "version": 1,
        "step": 6,
        "rows": [asdict(_ROW)],
        "norms": [asdict(_NORM)],
        "losses": [1.0],
        "accuracies": [0.5],
    }
    return {**state, "network": small().state_dict(), "optimizer": optimizer, "random": [], "average": []}


def _table(row: dict[str, object]) -> bytes:
    return f"{','.join(row)}\n{','.join(map(str, row.values()))}\n".encode()


def main() -> None:
    """Write every file anew."""
    config = asdict(Config(source="squeezenet1_1", data="photos", output="run", lr=0.05))
    fingerprint = asdict(Fingerprint("folder photos", 6, 4, ("a", "b"), "0" * 64, "1" * 64))
    run = {
        "config": config,
        "data": fingerprint,
        "resolved": asdict(Resolved(0.05, "batch", "as asked", "as asked", "kept", "crop", "as asked", 64)),
    }
    trials = [asdict(Trial(arm, lr, 0, "batch", None, (_ROW,), 1.0)) for arm in ("plain", "bn") for lr in (0.1, 1.0)]
    diverged = asdict(Trial("bn-naive", 1.0, 0, "", "the loss is nan", (), 1.0))
    rows = {**asdict(_ROW), "peak_lr": 0.05}
    records = {"plain": inserted(), "post": inserted(placement="post-activation")}
    torchvision = replace(record(inserted()), architecture=Architecture("squeezenet1_1", 3, 0.5))
    weights = _weights()
    everything: dict[str, dict[str, bytes]] = {
        "checkpoint": _checkpoints(),
        "weights": weights,
        "recognise": {name: weights[name] for name in ("zip", "legacy", "safetensors", "evil")},
        "image": _images(),
        "record": {
            **{name: record(network).to_json().encode() for name, network in records.items()},
            "torchvision": torchvision.to_json().encode(),
            "deep": b"[" * 2000,
        },
        "config": {
            "run.json": json.dumps(run).encode(),
            "model.json": json.dumps(run | {"config": config | {"model": "os:system"}}).encode(),
        },
        "state": {
            "zip": to_torch(_state()),
            "legacy": to_torch(_state(), legacy=True),
            "evil": to_torch(Evil("sentinel")),
        },
        "metrics": {"rows.csv": _table(rows)},
        "norms": {"rows.csv": _table(asdict(_NORM))},
        "comparison": {"four.json": json.dumps({"task": "a on b", "trials": [*trials, diverged]}).encode()},
        "trial": {"ended.json": json.dumps(trials[0]).encode(), "diverged.json": json.dumps(diverged).encode()},
        "arguments": _arguments(),
        "misbehaving": {
            name: name.encode() for name in ("traceback", "exit", "crash", "hang", "memory", "code", "call", "well")
        },
    }
    for target, files in everything.items():
        (CORPUS / target).mkdir(parents=True, exist_ok=True)
        for name, data in files.items():
            (CORPUS / target / name).write_bytes(data)


if __name__ == "__main__":
    main()
