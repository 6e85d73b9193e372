"""finetune and compare on what a user's own function gives: sound, clips, pairs, images of six channels."""

import json
import textwrap
from pathlib import Path

import pytest
import torch

import bnsurgery
from bnsurgery.networks import factories
from bnsurgery.records.record import record

NETS = """
    import torch
    from torch import nn

    torch.manual_seed(0)

    def _net(conv, pool, channels):
        return nn.Sequential(
            conv(channels, 6, 3), nn.ReLU(), conv(6, 6, 2), nn.ReLU(), pool(1), nn.Flatten(), nn.Linear(6, 5))
    def waves(): return _net(nn.Conv1d, nn.AdaptiveAvgPool1d, 2)
    def six(): return _net(nn.Conv2d, nn.AdaptiveAvgPool2d, 6)
    def clips(): return _net(nn.Conv3d, nn.AdaptiveAvgPool3d, 3)

    class Pair(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Conv2d(3, 6, 3), nn.Conv2d(1, 6, 3), nn.Linear(6, 5)
        def forward(self, left, right):
            return self.c((self.a(left).relu() + self.b(right).relu()).mean((2, 3)))
    def pair(): return Pair()
"""
DATA = """
    import torch
    from torch.utils.data import DataLoader, Dataset, TensorDataset

    COUNT = 24
    labels = torch.arange(COUNT) % 3

    def noise(*shape):
        return torch.randn(COUNT, *shape) + labels.view(-1, *[1] * len(shape))

    def of(x): return TensorDataset(x, labels)

    def waves():
        x = noise(2, 40).double()  # as NumPy gives
        return of(x), of(x), ["low", "middle", "high"]
    def six():
        print("reading")
        x = noise(6, 9, 9)
        batches = list(zip(x.split(5), labels.split(5)))
        return batches, batches
    def clips(): return of(noise(3, 4, 6, 6)), DataLoader(of(noise(3, 4, 6, 6)), 7)

    class Pairs(Dataset):
        def __init__(self, named): self.named, self.a, self.b = named, noise(3, 8, 8), noise(1, 8, 8)
        def __len__(self): return COUNT
        def __getitem__(self, i):
            a, b = self.a[i], self.b[i]
            return {"left": a, "right": b, "name": f"pair {i}"} if self.named else (a, b), i % 3
    def pairs(): return Pairs(False), Pairs(False)
    def named(): return DataLoader(Pairs(True), 8, shuffle=True), Pairs(True)

    def some(): return [((torch.randn(2, 3, 8, 8), torch.randn(2, 1, 8, 8)), 0)]

    def generator(): yield noise(2, 40), labels
    def nothing(): pass
    def fails(): raise KeyError("lost")
    class Broken(Dataset):
        targets = [0, 1, 2, 0]
        def __len__(self): return 4
        def __getitem__(self, i):
            if i == 3: raise OSError("no such sound")
            return torch.zeros(2, 40), i % 3
    def broken(): return Broken(), Broken()
    def later():
        def batches():
            yield torch.zeros(4, 2, 40), torch.tensor([0, 1, 2, 0])
            raise OSError("no such sound")
        return Again(batches), Again(batches)
    class Again:
        def __init__(self, make): self.make = make
        def __iter__(self): return self.make()
    def real(): return [(noise(2, 40), labels.float())], []
    def many(): return of(noise(2, 40)), [(torch.zeros(2, 2, 40), torch.tensor([1, 3]))]
"""
SHORT = ["--epochs", "1", "--device", "cpu"]


@pytest.fixture
def own(cli):
    Path("nets.py").write_text(textwrap.dedent(NETS))
    Path("data.py").write_text(textwrap.dedent(DATA))
    return cli


@pytest.mark.parametrize(
    ("net", "data", "shape", "options"),
    [
        ("waves", "waves", (2, 40), ["--batch-size", "8", "--num-workers", "1"]),
        ("six", "six", (6, 9, 9), []),
        ("clips", "clips", (3, 4, 6, 6), ["--batch-size", "8", "--num-workers", "0"]),
        ("pair", "pairs", None, ["--batch-size", "8", "--num-workers", "0"]),
        ("pair", "named", None, []),
    ],
)
def test_any_kind_of_input_is_trained_on(net, data, shape, options, own):
    model = ["--model", f"nets.py:{net}"]
    code, out, err = own("finetune", *model, "--data", f"data.py:{data}", *SHORT, *options)
    assert code == 0, err
    assert f"data         data.py:{data}: 24 training and 24 validation samples, 3 classes" in out
    best = f"runs/nets-{data}/best.safetensors"
    known = "" if shape else " --data FILE.py:FUNCTION  (which gives batches of inputs)"
    assert out.rstrip().endswith(f"Next: bnsurgery fold {best} --model nets.py:{net}{known}")
    assert ("reading" in err, "reading" in out) == (data == "six", False)
    done = record(bnsurgery.load(best, model=factories.build(f"nets.py:{net}")))
    assert done.task.classes == (("low", "middle", "high") if data == "waves" else ("0", "1", "2"))
    assert (done.input_shape, len(done.sites)) == (shape, 2)
    batches = [] if shape else ["--data", "data.py:some"]
    code, _, err = own("fold", best, *model, *batches, "-o", "folded.safetensors")
    assert code == 0, err
    Path("photo.png").touch()
    code, _, err = own("predict", best, "photo.png", *model)
    assert (code, "takes other inputs than images" in err, "data" in err) == (1, True, False)
    code, _, err = own("export", best, *model, "--to", "onnx", "--image-size", "9")
    assert (code, "--image-size is for images" in err) == (2, True)
    code, _, err = own("verify", best, *model)
    assert code == 1 and f"fine-tuned on 'data.py:{data}', not on images: pass --data FILE.py:FUNCTION" in err
    code, _, err = own("finetune", "--resume", f"runs/nets-{data}", *model)
    assert (code, f"pass --data data.py:{data} again" in err) == (1, True)
    code, out, err = own("finetune", "--resume", f"runs/nets-{data}", *model, "--data", f"data.py:{data}")
    assert code == 0, err
    if shape:
        code, _, err = own("export", best, *model, "--to", "exported-program", "-o", "net.pt2")
        assert code == 0, err
        assert torch.export.load("net.pt2").module()(torch.zeros(3, *shape)).shape == (3, 3)


def test_an_inserted_network_goes_on_with_sound(own):
    Path("few.py").write_text("import torch\ndef waves(): return [torch.randn(8, 2, 40)]\n")
    model = ["--model", "nets.py:waves"]
    code, _, err = own("insert", *model, "--data", "few.py:waves", "-o", "bn.safetensors")
    assert code == 0, err
    train = ["--data", "data.py:waves", *SHORT, "--batch-size", "8", "--num-workers", "0", "--lr", "auto"]
    code, out, err = own("finetune", "bn.safetensors", *model, *train, "--json")
    assert code == 0, err
    assert json.loads(out)["rows"][0]["step"] == 3


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("data.py:generator", "returned a generator, expected a tuple (training, validation)"),
        ("data.py:nothing", "returned a NoneType, expected a tuple (training, validation)"),
        ("data.py:fails", "data 'data.py:fails': calling it failed: KeyError: 'lost'"),
        ("data.py:later", "data 'data.py:later': calling it failed: OSError: no such sound"),
        ("data.py:real", "data 'data.py:real': training batch 1: targets: got torch.float32 ("),
        ("data.py:many", "data 'data.py:many': validation: targets: got 3, expected 0 to 2, for 3 classes"),
        ("data.py:labels", "expected a function that returns (training, validation)"),
        ("data.py:none", "'data.py' has no 'none'"),
        ("no.py:none", "data 'no.py': no such file"),
    ],
)
@pytest.mark.parametrize("command", ["finetune", "compare"])
def test_data_that_is_none_is_refused(command, data, message, own):
    code, out, err = own(command, "--model", "nets.py:waves", "--data", data, *SHORT, "-q")
    assert (code, out) == (1, "")
    assert message in err and not Path("runs/nets-none/config.json").exists()


@pytest.mark.parametrize("workers", [0, 1])
def test_a_sample_that_cannot_be_read_stops_the_run(workers, own):
    options = ["--batch-size", "4", "--num-workers", workers, "--arm", "plain"]
    code, _, err = own("finetune", "--model", "nets.py:waves", "--data", "data.py:broken", *SHORT, *options, "-q")
    assert code == 1
    assert "calling it failed: OSError: no such sound (in data 'data.py:broken': training sample 3)" in err


def test_options_of_images_are_refused(own):
    for option in (["--image-size", "8"], ["--augment", "crop"], ["--skip-bad"], ["--root", "x"]):
        code, _, err = own("finetune", "--model", "nets.py:waves", "--data", "data.py:waves", *SHORT, *option)
        assert (code, f"{option[0]} is for images: what 'data.py:waves' gives" in err) == (1, True)
    code, _, err = own("finetune", "--model", "nets.py:six", "--data", "data.py:six", *SHORT, "--batch-size", "8")
    assert (code, "--batch-size is for a Dataset: 'data.py:six' gives batches of its own, of 5" in err) == (1, True)


def test_two_arms_are_compared_on_sound(own):
    own_words = ["--model", "nets.py:waves", "--data", "data.py:waves"]
    options = [*SHORT, "--batch-size", "8", "--num-workers", "0", "--arms", "plain,bn", "--rates", "0.1", "--jobs", "1"]
    code, out, err = own("compare", *own_words, *options)
    assert code == 0, err
    assert "nets.py:waves on data.py:waves" in out
    trials = [json.loads(path.read_text()) for path in sorted(Path("runs/compare-nets-waves/trials").iterdir())]
    assert [trial["arm"] for trial in trials] == ["bn", "plain"]
    after = next(line for line in out.splitlines() if line.startswith("Next: "))
    code, _, err = own(*after.split()[2:])
    assert code == 0, err
    assert Path("runs/nets-waves/best.safetensors").exists() or Path("runs/nets-waves-plain/best.safetensors").exists()
