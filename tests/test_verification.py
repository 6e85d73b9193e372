import copy
from dataclasses import dataclass

import pytest
import torch
from torch import nn
from unchanged import assert_unchanged, snapshot

from bnsurgery import CalibrationError, insert, verify


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
    assert "NOT bit-identical" in str(report)


def test_drift_is_that_of_train_mode(custom, images):
    """Against a copy put into train mode by hand, group by group."""
    x = images(9, 32)
    bn_model = insert(custom, [x])
    report = verify(custom, bn_model, [x], drift_batch_sizes=(4,))
    by_hand = copy.deepcopy(bn_model).train()
    with torch.no_grad():
        got = torch.cat([by_hand(x[:4]), by_hand(x[4:8])])
        expected = custom(x[:8])
    assert report.train_drift[4] == pytest.approx(((got - expected).norm() / expected.norm()).item(), rel=1e-5)


def test_drift_sizes_beyond_the_data_are_left_out(custom, images):
    bn_model = insert(custom, [images(8, 32)])
    assert list(verify(custom, bn_model, [images(7, 32)]).train_drift) == [2]
    assert verify(custom, bn_model, [images(7, 32)], drift_batch_sizes=()).train_drift == {}
    with pytest.raises(ValueError, match="at least 2"):
        verify(custom, bn_model, [images(4, 32)], drift_batch_sizes=(1, 2))


def test_dropout_does_not_count_as_drift(images):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Dropout(0.9), nn.Flatten(), nn.Linear(144, 3)).train()
    x = images(16, 8)
    report = verify(model, insert(model, [x]), [x], drift_batch_sizes=(16,))
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
