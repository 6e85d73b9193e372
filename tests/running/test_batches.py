"""What a batch is called with: dicts by the signature of forward, parts of batches, and batches joined."""

import pytest
import torch
from torch import nn

import bnsurgery
from bnsurgery import CalibrationError
from bnsurgery.running.batches import Inputs, join


class Whole(nn.Module):
    """As matchers and detectors that take a loader's dict; subclasses take it in other ways."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 2, 3)

    def forward(self, batch):
        if not batch["name"][0].startswith("n") or batch.get("mask") is not None:
            return batch["image"]
        return self.compute(batch["image"])

    def compute(self, image, mask=None):
        result = self.b(torch.relu(self.a(image)))
        return result if mask is None else result * mask.view(-1, 1, 1, 1)


class ByName(Whole):
    def forward(self, image, mask=None):
        return self.compute(image, mask)


class WithFlag(Whole):
    def forward(self, data, image=None, train=False):
        return self.compute(data["image"])


class Anything(Whole):
    def forward(self, **data):
        assert "labels" in data
        return self.compute(data["image"])


def loader(*keys):
    torch.manual_seed(1)
    values = {"image": torch.randn(4, 3, 12, 12) + 1, "labels": torch.arange(4), "name": [f"n{i}" for i in range(4)]}
    return [{key: values[key] for key in keys} for _ in range(3)]


@pytest.mark.parametrize(
    ("network", "batches"),
    [
        (Whole, loader("image", "name", "labels")),
        (Whole, [(batch, batch["labels"]) for batch in loader("image", "name", "labels")]),
        (Whole, [((batch,),) for batch in loader("image", "name")]),
        (Whole, [{"batch": batch} for batch in loader("image", "name")]),
        (ByName, loader("image")),
        (ByName, loader("labels", "name", "image")),
        (ByName, [{"mask": torch.ones(4), **batch} for batch in loader("image", "labels")]),
        (WithFlag, loader("image", "labels")),
        (Anything, loader("image", "labels")),
    ],
)
def test_a_dict_goes_in_as_forward_takes_it(network, batches, tmp_path):
    model = network().eval()
    bn_model = bnsurgery.insert(model, batches)
    seen = []
    handle = model.a.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    report = bnsurgery.verify(model, bn_model, batches)
    handle.remove()
    assert all(torch.equal(x, loader("image")[0]["image"]) for x in seen) and len(seen) == 3
    assert report.bit_identical and report.samples == 12 and list(report.train_drift) == [2, 8]
    assert bnsurgery.verify(model.forward, bn_model, batches).bit_identical
    assert len(bnsurgery.plan(model, batches[0]).sites) == 1
    bnsurgery.recalibrate_(bn_model, batches)
    written = bnsurgery.export(bn_model, tmp_path / "net.pth", to="state-dict", example=batches[0])
    assert written.folds_back or written.equivalence.within(1e-5)


def test_a_mask_that_forward_takes_is_not_left_out():
    model = ByName().eval()
    batches = [{"image": torch.randn(4, 3, 12, 12), "mask": torch.tensor([0.0, 1, 1, 1]), "labels": torch.zeros(4)}]
    report = bnsurgery.verify(lambda image, mask: model.compute(image, mask), bnsurgery.insert(model, batches), batches)
    assert report.bit_identical


def test_what_forward_writes_into_its_dict_is_seen_by_nobody():
    class Writes(Whole):
        def forward(self, batch):
            assert "result" not in batch
            batch["result"] = self.compute(batch["image"])
            return batch["result"]

    model, batches = Writes().eval(), loader("image", "name")
    bn_model = bnsurgery.insert(model, batches)
    assert bnsurgery.verify(model.forward, bn_model, batches).bit_identical
    assert [list(batch) for batch in batches] == [["image", "name"]] * 3


@pytest.mark.parametrize(
    ("network", "batch", "message"),
    [
        (ByName, {"picture": torch.randn(2, 3, 12, 12)}, "The dict was its one argument"),
        (nn.Sequential, {"image": torch.randn(2, 3, 12, 12)}, "The dict was its one argument"),
        (type("Two", (Whole,), {"forward": lambda self, x, y: self.a(x)}), {"x": torch.ones(2, 3, 9, 9)}, "'y'"),
    ],
)
def test_a_dict_that_fits_in_no_way(network, batch, message):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 2, 3)) if network is nn.Sequential else network()
    with pytest.raises(CalibrationError, match=message):
        bnsurgery.insert(model.eval(), [batch])


def test_parts_of_a_batch_with_names():
    batch = Inputs.of({"x": torch.arange(6).view(3, 2), "names": ["a", "b", "c"], "scales": [1, 2], "flag": True})
    part = batch.take(1, 3)
    assert part.kwargs["x"].tolist() == [[2, 3], [4, 5]]
    assert (part.kwargs["names"], part.kwargs["scales"], part.kwargs["flag"]) == (["b", "c"], [1, 2], True)


def test_joining():
    def batch(*numbers, **more):
        return Inputs.of({"x": torch.tensor(numbers).view(-1, 1), "names": [str(n) for n in numbers], **more})

    both = join([batch(1, 2, flag=2), batch(3, flag=2)])
    assert both.kwargs["x"].flatten().tolist() == [1, 2, 3] and both.kwargs["names"] == ["1", "2", "3"]
    assert both.kwargs["flag"] == 2
    assert join([]) is None
    assert join([batch(1, 2, flag=2), batch(3, flag=3)]) is None
    assert join([batch(1, 2), batch(3, flag=2)]) is None
    assert join([batch(1, 2, s=torch.tensor(1.0)), batch(3, s=torch.tensor(1.0))]) is None
    array = torch.ones(2).numpy()
    assert join([batch(1, 2, a=array), batch(3, a=array)]).kwargs["a"] is array
    assert join([batch(1, 2, a=array), batch(3, a=array.copy())]) is None


def test_joining_lists_of_images():
    """Three images of three channels: they stay images of three channels."""
    lists = [[torch.full((3, 4, 4), float(i + 3 * j)) for i in range(3)] for j in range(2)]
    (images,) = join([Inputs.of((images,)) for images in lists]).args
    assert [tuple(image.shape) for image in images] == [(3, 4, 4)] * 6
    assert [image[0, 0, 0].item() for image in images] == [0, 1, 2, 3, 4, 5]
