"""The exceptions of this package, all of them under LoraError:

LoraError
├── ConfigError      a setting is invalid, or does not go with another (also a ValueError)
│   ├── SettingError a field has an invalid value
│   └── FileError    a configuration file contains an invalid setting
├── TargetError      target_modules or modules_to_save do not fit the model
├── CheckpointError  an adapter's files do not fit the model, or cannot be read or written
├── MergeError       merge, restore or disabled() is not possible in the model's present state
├── ContractError    a method breaks a clause of the contract (also an AssertionError)
├── ModelError       a base model or its tokenizer cannot be loaded
├── DataError        a data set cannot be read as asked
├── RunError         a run directory cannot be written, or has unexpected contents
├── TrainingError    training cannot continue
└── StoppedError     a signal stopped a run; its state is saved

Every message says what you asked for, what was found, and the next command.
"""

import shlex


def command(*words: object) -> str:
    """Returns a command line to paste into a shell, with special characters quoted."""
    return shlex.join(map(str, words))


class LoraError(Exception):
    """The base class: `except LoraError` catches every error of this package and no other."""


class ConfigError(LoraError, ValueError):
    pass


class SettingError(ConfigError):
    """A field has an invalid value. Python messages name the field, the command line its flag."""

    def __init__(self, field: str, reason: str) -> None:
        super().__init__(field, reason)
        self.field, self.reason = field, reason

    def __str__(self) -> str:
        return self.about(self.field)

    def about(self, name: str) -> str:
        """Returns the message with the field called `name`."""
        return f"{name} {self.reason} Set {name}."


class FileError(ConfigError):
    """A configuration file contains an invalid setting. Messages name keys as the file does."""


class TargetError(LoraError):
    pass


class CheckpointError(LoraError):
    pass


class MergeError(LoraError):
    pass


class ContractError(LoraError, AssertionError):
    pass


class ModelError(LoraError):
    pass


class DataError(LoraError):
    pass


class RunError(LoraError):
    pass


class TrainingError(LoraError):
    pass


class StoppedError(LoraError):
    def __init__(self, message: str, signal: int) -> None:
        super().__init__(message)
        self.signal = signal
