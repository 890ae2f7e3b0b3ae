"""Images and labels, up to one micro-batch."""
