"""Train the network of `tasks.mnist_vgg` again, in some minutes, and write it to benchmarks/mnist_vgg.safetensors.

python -m benchmarks.train_mnist_vgg
"""

from dataclasses import replace

import torch
from safetensors.torch import save_file

from .tasks import BASE, MNIST_VGG, mnist, trained, untrained_mnist_vgg

_IMAGES = 20_000


def main() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    config = replace(BASE, image_size=28, arm="plain", head="new", head_init="random", epochs=4, lr=0.03)
    model, accuracy = trained(untrained_mnist_vgg(), replace(mnist(_IMAGES, "MNIST"), test=None), config)
    save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items()}, MNIST_VGG)
    print(f"{MNIST_VGG.name}: trained on {_IMAGES:,} images of MNIST, {100 * accuracy:.1f} % of 1,000 others right")


if __name__ == "__main__":
    main()
