"""Exports for those who do not have this package: state dicts, ONNX, torch.export."""
