"""What a network is called with, the call, and the modes and states that it has again afterwards."""
