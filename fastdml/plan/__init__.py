"""What a cohort would cost on a mesh of devices: memory, time of a step, traffic."""
