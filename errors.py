"""The two exceptions whose text is meant for the user."""


class BenchmarkError(Exception):
    """A problem the user can mend: its text is the whole message, shown without a traceback."""


class ConfigError(BenchmarkError):
    """A configuration that cannot be run: names the key, the value given and what would be valid."""
