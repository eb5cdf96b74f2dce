"""Images to batches: resident in memory, decoded by DALI, or by worker processes."""
