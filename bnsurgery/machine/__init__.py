"""Differences between machines and installations: devices, operating systems, torch's version."""
