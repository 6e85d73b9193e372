"""Coverage-guided fuzzing of one target with atheris, which an extra of the package brings: `pip install .[fuzz]`."""

import importlib
import os
import sys
import tempfile
from pathlib import Path
from random import Random

import atheris
import torch.serialization

with atheris.instrument_imports(include=["bnsurgery"]):
    from .targets import TARGETS
with atheris.instrument_imports(include=["torch"]):  # of torch these two alone: all of it takes minutes
    importlib.reload(torch._weights_only_unpickler)
    importlib.reload(torch.serialization)

from .networks import CORPUS, write_files
from .session import watch


def fuzz(seconds: int, name: str, seed: int, findings: Path) -> None:
    """Feed the target until the time is over or an input is not refused as it should be; the process ends with it."""
    target, corpus = TARGETS[name], TARGETS[name].corpus
    findings = findings.resolve()
    findings.mkdir(exist_ok=True)
    folder = tempfile.mkdtemp()
    place = Path(folder, "a", "b", "c")  # names with .. in them stay inside
    place.mkdir(parents=True)
    grown = Path(folder, "grown")
    grown.mkdir()
    os.chdir(place)
    write_files()
    executed = watch()

    def once(data: bytes) -> None:
        target(data)
        assert not executed and not Path("sentinel").exists(), f"code: {executed}"

    def mutate(data: bytes, largest: int, number: int) -> bytes:
        random = Random(number)
        if random.random() < 0.5:
            return atheris.Mutate(data, largest)
        return target.mutate(data, random, corpus)[:largest]

    limits = [f"-max_total_time={seconds}", "-timeout=10", "-rss_limit_mb=4096", "-max_len=50000", f"-seed={seed + 1}"]
    places = [f"-artifact_prefix={findings}/{name}-", str(grown), str(CORPUS / name)]
    atheris.Setup([sys.argv[0], *limits, *places], once, custom_mutator=mutate)
    atheris.Fuzz()
