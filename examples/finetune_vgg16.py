"""Fine-tune torchvision's VGG-16 on a folder of images: with BatchNorm in training, without it in the saved network.

    python finetune_vgg16.py DATA [--epochs 10] [--lr 0.01] [--output vgg16-finetuned.pth]

DATA has train/CLASS/*.jpg and val/CLASS/*.jpg. The output is a state dict of torchvision's vgg16(num_classes=N).
"""

import argparse
import sys
from pathlib import Path

import torch
from torch import nn
from torch.optim.lr_scheduler import OneCycleLR
from torch.utils.data import DataLoader
from torchvision import datasets, models, transforms

import bnsurgery
from bnsurgery.finetune import fit_head_

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@torch.no_grad()
def evaluate(model, loader, when):
    model.eval()
    right = sum((model(images.to(DEVICE)).argmax(1).cpu() == labels).sum().item() for images, labels in loader)
    print(f"accuracy {100 * right / len(loader.dataset):.2f} % {when}", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--arch", default="vgg16", help="or another of torchvision's without BatchNorm")
    parser.add_argument("--weights", default="DEFAULT", help="DEFAULT (torchvision's), a state dict's file, or none")
    parser.add_argument("--size", type=int, default=224, help="height and width of the images in pixels")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--lr", type=float, default=0.01)
    parser.add_argument("--workers", type=int, default=4, help="processes that read images")
    parser.add_argument("--output", type=Path, default="vgg16-finetuned.pth")
    args = parser.parse_args()

    weights = models.get_model_weights(args.arch).DEFAULT
    preprocess = weights.transforms(crop_size=args.size, resize_size=round(args.size * 256 / 224))
    augment = transforms.Compose([transforms.RandomHorizontalFlip(), preprocess])
    folders = ((args.data / "train", augment), (args.data / "train", preprocess), (args.data / "val", preprocess))
    try:
        train, calibration, val = (datasets.ImageFolder(*folder) for folder in folders)
    except OSError as error:
        sys.exit(f"{error} (expected {args.data}/train/CLASS/*.jpg and {args.data}/val/CLASS/*.jpg)")
    if train.classes != val.classes or len(train.classes) < 2:
        sys.exit(f"expected the same classes, two or more: {train.root} has {train.classes}, {val.root} {val.classes}")
    options = {"batch_size": min(args.batch_size, len(train)), "num_workers": args.workers}
    train = DataLoader(train, shuffle=True, drop_last=True, **options)
    calibration, val = DataLoader(calibration, **options), DataLoader(val, **options)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    model = models.get_model(args.arch, num_classes=len(val.dataset.classes), dropout=0.2).to(DEVICE).eval()
    if args.weights != "none":
        state = weights.get_state_dict() if args.weights == "DEFAULT" else torch.load(args.weights, weights_only=True)
        model.load_state_dict(state | dict(list(model.state_dict().items())[-2:]))  # the last layer is new
    model = bnsurgery.insert(model, calibration)
    print("head", fit_head_(model, calibration))
    *body, weight, bias = model.parameters()
    groups = [  # weights; biases and BatchNorm, which do not decay; the head, which has no BatchNorm behind it
        {"params": [p for p in body if p.ndim > 1], "lr": args.lr, "weight_decay": 1e-4},
        {"params": [p for p in body if p.ndim == 1], "lr": args.lr, "weight_decay": 0},
        {"params": [weight, bias], "lr": args.lr / 10, "weight_decay": 0},
    ]
    optimizer = torch.optim.SGD(groups, momentum=0.9, nesterov=True)
    schedule = OneCycleLR(optimizer, [group["lr"] for group in groups], args.epochs * len(train), pct_start=0.1)
    for epoch in range(1, args.epochs + 1):
        model.train()
        for images, labels in train:
            loss = nn.functional.cross_entropy(model(images.to(DEVICE)), labels.to(DEVICE))
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 5.0)
            optimizer.step()
            schedule.step()
        bnsurgery.recalibrate_(model, calibration)
        evaluate(model, val, f"after epoch {epoch}")
    model = bnsurgery.fold(model)
    evaluate(model, val, "folded")
    torch.save(model.cpu().state_dict(), args.output)


if __name__ == "__main__":
    main()
