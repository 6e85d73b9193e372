"""Networks of torchvision, timm, ONNX files and users' functions, with weights, preprocessing and class names."""
