from tests.processing.reference import config, directory, family, reference, tokenizer  # noqa: F401
