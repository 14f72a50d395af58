"""What a training step needs before there is one: bytes, and what fits into them."""
