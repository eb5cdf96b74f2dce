"""What trained peers and their predictions show, beside their scores."""
