"""How mutual learning is written today, a habit a file: what fastdml is measured against.

A loss is `losses(logits, labels) -> K losses`, with the K gradients taken as that habit takes them;
a training loop is called with a batch and returns the peers' losses as numbers.
"""
