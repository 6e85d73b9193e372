"""What is measured on data: moments of activations, and by how much two networks differ.

Also what follows from it: which statistics mode goes with which batch.
"""
