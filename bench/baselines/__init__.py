"""Mutual learning as it is usually written, one form a file: the baselines of the benchmarks.

A loss is `losses(logits, labels) -> K losses`, with the K gradients taken as that code takes them;
a training loop is called with a batch and returns the peers' losses as numbers. The most usual one,
a kl_div for each pair, is `fastdml.machine.pairwise`: `fastdml bench` measures against it too.
"""
