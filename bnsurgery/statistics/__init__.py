"""Measurements on data: moments of activations, the difference of two networks, and which statistics mode follows."""
