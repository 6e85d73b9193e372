"""From image files to batches: finding, decoding, preprocessing, batching."""
