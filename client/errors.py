"""Every error that Sottovoce raises on purpose.

SottovoceError                one clear line for a person: what, which value, what to do
 ├── ConfigError              a setting is impossible
 ├── DataError                a file or an example is malformed
 ├── RunError                 a run folder or checkpoint cannot be used
 ├── UnsupportedLayer         a trainable layer has no per-example form
 └── BudgetExceeded           the next release would pass the privacy budget
"""


class SottovoceError(ValueError):
    """Base of all errors that are shown to a person as one line."""


class ConfigError(SottovoceError):
    """A setting is impossible, alone or with another one."""


class DataError(SottovoceError):
    """A file or an example is malformed."""


class RunError(SottovoceError):
    """A run folder or one of its checkpoints cannot be used."""


class UnsupportedLayer(SottovoceError):
    """A trainable layer has no per-example gradient form."""


class BudgetExceeded(SottovoceError):
    """The next release would exceed the privacy budget."""
