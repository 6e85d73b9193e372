"""Run a network on whatever a caller passes as a batch, and leave the network as it was."""
