"""Files are written whole or not at all, by one process at a time, and read without trust.

Weights of strangers, checkpoints, and the metadata of exported files.
"""
