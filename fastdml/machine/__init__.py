"""What a machine has, whether the loss is right on it, and how fast: `fastdml doctor`, `bench`."""
