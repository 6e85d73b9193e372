"""What is written down of an insertion and kept with the network.

The record, which of torchvision's architectures the network is, and its task.
"""
