"""Speed and memory, as ratios against a peer interleaved in the same run; medians. `make bench` runs them all."""
