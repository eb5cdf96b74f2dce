"""Files on disk: downloads and archives, decoding, checking every file before training."""
