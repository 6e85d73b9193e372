import copy
import re
from dataclasses import dataclass

import pytest
import torch
from torch import nn
from unchanged import assert_unchanged, snapshot

from bnsurgery import BNSurgeryWarning, CalibrationError, insert, verify


def test_bit_identical_insertion(custom, images):
    x = images(40, 32)
    bn_model = insert(custom, [x[:8]])
    before = snapshot(custom), snapshot(bn_model)
    report = verify(custom, bn_model, x.split(16))
    assert_unchanged(custom, before[0])
    assert_unchanged(bn_model, before[1])
    assert report.bit_identical
    assert (report.samples, report.max_abs, report.max_rel, report.top1_agreement) == (40, 0.0, 0.0, 1.0)
    assert list(report.train_drift) == [2, 8, 32]
    assert report.train_drift[2] > report.train_drift[8] > report.train_drift[32] > 0
    assert "bit-identical on 40 images" in str(report)
    assert report.to_dict()["train_drift"][2] == report.train_drift[2]


def test_differences_are_measured(images):
    """A known change: one class's bias moved by 3, which flips the argmax of some samples."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 4)).eval()
    other = copy.deepcopy(model)
    with torch.no_grad():
        other[1].bias[2] += 3
        x = images(10, 2)
        a, b = model(x), other(x)
    report = verify(model, other, [x[:4], x[4:]])
    assert not report.bit_identical
    assert report.max_abs == pytest.approx((a - b).abs().max().item())
    assert report.max_rel == pytest.approx(((a - b).abs().max() / a.abs().max()).item())
    assert report.top1_agreement == pytest.approx((a.argmax(1) == b.argmax(1)).float().mean().item())
    assert 0 < report.top1_agreement < 1
    assert report.train_drift == {}
    assert str(report).startswith(
        "eval mode    different on 10 images of 3x2x2\n             largest difference 3, relative "
    )
    with torch.no_grad():
        other[1].bias[2] -= 3 - 1e-6 * a.abs().max()
    near = verify(model, other, [x])
    assert not near.bit_identical
    assert str(near).startswith("eval mode    equal within 1e-5, not to the bit, on 10 images of 3x2x2\n")
    assert near.text("as after training").startswith(
        "eval mode    equal within 1e-5, as after training, on 10 images of 3x2x2\n"
    )


def test_drift_is_that_of_train_mode(custom, images):
    """Against a copy put into train mode by hand, group by group; the ninth image is in a full group, too."""
    x = images(9, 32)
    bn_model = insert(custom, [x])
    report = verify(custom, bn_model, [x], drift_batch_sizes=(4,))
    groups = [x[:4], x[4:8], x[5:]]
    by_hand = copy.deepcopy(bn_model).train()
    with torch.no_grad():
        got = torch.cat([by_hand(group) for group in groups])
        expected = custom(torch.cat(groups))
    assert report.train_drift[4] == pytest.approx(((got - expected).norm() / expected.norm()).item(), rel=1e-5)
    assert report.drift_samples == 9


def test_drift_is_of_all_images_whatever_else_is_asked_for(custom, images):
    """Of images that come sorted, the first groups say nothing of the rest: all count, or 64 of more, said so."""
    x = torch.cat([0.01 * images(24, 32), images(40, 32)])
    bn_model = insert(custom, [x])
    report = verify(custom, bn_model, [x], drift_batch_sizes=(2,))
    for split, sizes in ((48, (2,)), (5, (2, 8, 32)), (64, (2, 4, 8, 16, 32))):
        other = verify(custom, bn_model, x.split(split), drift_batch_sizes=sizes)
        assert other.train_drift[2] == pytest.approx(report.train_drift[2], rel=1e-4)
        assert (other.drift_samples, other.drift_inputs) == (64, "64 images of 3x32x32")
    of_eight = verify(custom, bn_model, [x[:8]], drift_batch_sizes=(2,)).train_drift[2]
    assert abs(report.train_drift[2] / of_eight - 1) > 0.1
    assert "drift by batch size: " in str(report)
    more = verify(custom, bn_model, [x, images(9, 32)], drift_batch_sizes=(2,))
    assert more.train_drift[2] == pytest.approx(report.train_drift[2], rel=1e-4)
    assert (more.samples, more.drift_inputs) == (73, "the first 64 images of 3x32x32")
    assert "drift by batch size on the first 64: " in str(more)
    assert verify(custom, bn_model, [x, images(9, 32)], drift_batch_sizes=(70,)).drift_samples == 70


def test_drift_sizes_beyond_the_data_are_left_out(custom, images):
    bn_model = insert(custom, [images(8, 32)])
    assert list(verify(custom, bn_model, [images(7, 32)]).train_drift) == [2]
    assert verify(custom, bn_model, [images(7, 32)], drift_batch_sizes=()).train_drift == {}
    with pytest.raises(ValueError, match="at least 2"):
        verify(custom, bn_model, [images(4, 32)], drift_batch_sizes=(1, 2))


def test_dropout_does_not_count_as_drift(images):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Dropout(0.9), nn.Flatten(), nn.Linear(144, 3)).train()
    x = images(16, 8)
    bn_model = insert(model.eval(), [x]).train()
    model.train()
    report = verify(model, bn_model, [x], drift_batch_sizes=(16,))
    assert report.bit_identical
    assert report.train_drift[16] < 1e-4
    assert model.training


def test_structured_outputs(images):
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.head = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 2, 1)

        def forward(self, x):
            y = torch.relu(self.conv(x))
            return {"out": self.head(y), "aux": (y, y.mean())}

    model, x = Two().eval(), images(6, 8)
    bn_model = insert(model, [x])
    report = verify(model, bn_model, [x])
    assert report.bit_identical
    assert report.top1_agreement is None
    with torch.no_grad():
        bn_model.head.bias += 1
    assert verify(model, bn_model, [x]).max_abs == pytest.approx(1)


def test_dataclass_outputs():
    @dataclass
    class Output:
        logits: torch.Tensor

    def reference(x):
        return Output(x * 2)

    class Same(nn.Module):
        def forward(self, x):
            return {"wrapped": Output(x * self.factor)}

    model = Same()
    model.factor = 2
    assert verify(reference, model, [torch.ones(2, 3)]).bit_identical
    model.factor = 3
    assert verify(reference, model, [torch.ones(2, 3)]).max_abs == 1


def test_networks_that_work_in_place_get_a_copy(images):
    model = nn.Sequential(nn.ReLU(inplace=True), nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 1)).eval()
    x = images(6, 8)
    before = x.clone()
    assert verify(model, insert(model, [x]), [x]).bit_identical
    assert torch.equal(x, before)


def test_a_function_can_be_the_reference(custom, images):
    assert verify(custom, custom, [images(2, 32)]).bit_identical
    assert verify(lambda x: custom(x) + 1, custom, [images(2, 32)]).max_abs == pytest.approx(1)


class Nothing(nn.Module):
    def forward(self, x):
        return None


def test_refusals(custom, images):
    with pytest.raises(CalibrationError, match="verify: no data"):
        verify(custom, custom, [])
    with pytest.raises(CalibrationError, match="outputs' shapes differ"):
        verify(lambda x: custom(x)[:, :1], custom, [images(2, 32)])
    with pytest.raises(CalibrationError, match="NaN or Inf in the reference's outputs"):
        verify(lambda x: custom(x) / 0, custom, [images(2, 32)])
    broken = insert(custom, [images(4, 32)])
    broken.squeeze.norm.running_var.fill_(-1)
    with pytest.raises(CalibrationError, match="NaN or Inf in the candidate's outputs"):
        verify(custom, broken, [images(2, 32)])
    with pytest.raises(CalibrationError, match="no tensors"):
        verify(lambda x: None, Nothing(), [images(2, 32)])


def test_where_the_largest_difference_is():
    """Over all batches and outputs: image 6 is the third of the second batch."""
    first, second = torch.zeros(4, 5), torch.zeros(4, 2, 3)
    calls = iter([0.0, 1.0])

    def candidate(x):
        found = first.clone(), second.clone()
        found[1][2, 1, 0] += next(calls)
        return found

    class Network(nn.Module):
        def forward(self, x):
            return candidate(x)

    report = verify(lambda x: (first, second), Network(), [torch.zeros(4, 1)] * 2, drift_batch_sizes=())
    assert report.worst == (1, 6, 1, 0)
    assert "at image 6, index [1, 0] of output tensor 1, counted from 0" in str(report)


class Detector(nn.Module):
    """Two convolutions, and whatever `shape` makes of their output (N, 4, 8, 8)."""

    def __init__(self, shape):
        super().__init__()
        self.a, self.b, self.shape = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 3), shape

    def forward(self, x):
        return self.shape(self.b(torch.relu(self.a(x))))


@pytest.mark.parametrize(
    ("shape", "size", "why"),
    [
        (lambda y: y.permute(0, 2, 3, 1).reshape(1, -1, 2), 1, r"output of shape \(1, 256, 2\) .* each of 2 inputs"),
        (lambda y: y.reshape(1, 128, 2), 1, "failed on an input of shape"),  # takes batches of one only
        (lambda y: y.transpose(0, 1), 3, r"output of shape \(4, 3, 8, 8\) .* each of 3 inputs"),
        (lambda y: y.transpose(0, 1), 4, r"output of shape \(4, 2, 8, 8\) .* each of 2 inputs"),  # 4 channels, 4 inputs
        (lambda y: (y, y.mean()), 3, r"output of shape \(\) .* each of 3 inputs"),
        (lambda y: y.flatten(1)[:, :1].reshape(-1)[:0], 3, r"output of shape \(0,\)"),
        (lambda y: y * 0, 3, "outputs are zero"),
    ],
)
def test_where_drift_cannot_be_measured_the_report_says_why(images, shape, size, why):
    model, batches = Detector(shape).eval(), images(12, 12).split(size)
    report = verify(model, insert(model, batches), batches)
    assert (report.bit_identical, report.samples, report.train_drift) == (True, 12, {})
    assert re.search(why, report.no_drift)
    assert re.search(why, " ".join(str(report).split("train mode")[1].split()))


def test_the_drift_that_can_be_measured_is_there_beside_the_reason(images):
    """A network that takes no more than 4 inputs at a time."""
    model, x = Detector(lambda y: y[:4]).eval(), images(16, 12)
    report = verify(model, insert(model, x.split(4)), x.split(4), drift_batch_sizes=(2, 4, 8))
    by_two = verify(model, insert(model, x.split(4)), x.split(4), drift_batch_sizes=(2,))
    assert list(report.train_drift) == [2, 4] and report.train_drift[2] == by_two.train_drift[2]
    assert "output of shape (4, 4, 8, 8) does not have one row for each of 8 inputs" in report.no_drift
    assert by_two.no_drift is None


def test_other_reasons_for_no_drift(custom, images):
    x = images(6, 32)
    bn_model = insert(custom, [x])
    assert verify(custom, bn_model, [x], drift_batch_sizes=()).no_drift is None
    assert verify(custom, bn_model, [x[:1]]).no_drift == "it takes 2 inputs, got 1"
    assert verify(custom, custom, [x]).no_drift == "the network has no BatchNorm"
    other_sizes = [images(2, 12), images(2, 14)]
    model = Detector(lambda y: y).eval()
    assert list(verify(model, insert(model, other_sizes), other_sizes).train_drift) == [2]


def test_rows_that_are_no_samples(images):
    """Three boxes from every batch: no top-1 agreement, and the index of a difference is the output's."""
    model, x = Detector(lambda y: y.mean((0, 2)).T[:3, :2]).eval(), images(8, 12)
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.b.bias[1] += 5
    report = verify(model, other, x.split(4))
    assert report.top1_agreement is None
    assert report.worst[:2] in ((0, 0), (0, 4)) and report.worst[3] == 1


def test_numbers_that_are_not_finite_by_construction(images):
    """0/0 in one output, infinite in places of the other: these are compared, too."""

    def odd(y):
        return (y - y) / (y - y), torch.where(y > y.mean(), y, torch.inf)

    model, x = Detector(odd).eval(), images(4, 12)
    with pytest.warns(BNSurgeryWarning, match=r"of 2048 numbers in the outputs are NaN or Inf in both"):
        report = verify(model, model, [x])
    assert report.bit_identical and report.max_abs == 0
    with pytest.raises(CalibrationError, match="NaN or Inf in the reference's outputs, not in the other's"):
        verify(model, Detector(lambda y: (y - y, odd(y)[1])), [x])
    with pytest.raises(CalibrationError, match="NaN or Inf in the reference's"):
        verify(lambda x: torch.full((4, 2), torch.inf), Detector(lambda y: y.flatten(1)[:, :2] * torch.nan), [x])
    with pytest.raises(CalibrationError, match="all outputs of the networks are NaN or Inf"):
        verify(lambda x: torch.full((4, 2), torch.nan), Detector(lambda y: y.flatten(1)[:, :2] * torch.nan), [x])
    with pytest.warns(BNSurgeryWarning):
        assert 0 < verify(lambda x: (model(x)[0], model(x)[1] + 1e-6), model, [x]).max_abs < 1e-5


def test_batches_of_several_sizes_are_measured_up_to_the_first_change():
    """The first 8 images, and the reason why 32 of 40 could not be put together; what comes later is not mixed in."""
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    ).eval()
    small, large = torch.randn(8, 3, 16, 16), torch.randn(8, 3, 20, 20)
    bn_model = insert(model, [small])
    result = verify(model, bn_model, [small, large, small, small, small])
    assert result.samples == 40 and list(result.train_drift) == [2, 8] and result.drift_samples == 8
    assert "have other shapes" in result.no_drift
    alone = verify(model, bn_model, [small])
    assert alone.train_drift == pytest.approx(result.train_drift) and alone.no_drift is None
    apart = verify(model, bn_model, [small[:1], large], drift_batch_sizes=(2,))
    assert not apart.train_drift and "have other shapes" in apart.no_drift
