"""A round as others do it, beside ours: the same model, rows and epochs, on the same machine."""
