"""What lies on disk and how it is read: image trees, codes caches, samples folders.

Nothing is imported here: the image workers import this package and must not pay for torch.
"""
