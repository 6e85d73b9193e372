"""Networks by name or file, with their weights, preprocessing and classes.

torchvision's, timm's, those that a user's function makes, ONNX.
"""
