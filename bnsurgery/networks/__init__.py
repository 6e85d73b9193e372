"""Networks by name or file, with their weights and preprocessing, and what they say of images.

Torchvision's, timm's, those that a user's function makes, ONNX.
"""
