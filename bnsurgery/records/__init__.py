"""The record of an insertion, kept with the network: plan, options, torchvision architecture and task."""
