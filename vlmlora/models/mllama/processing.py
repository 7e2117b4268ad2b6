"""Placeholder."""


def load_processor(directory, config):
    """Not yet."""
    raise NotImplementedError
