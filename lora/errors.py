"""Every error this package raises on purpose, one tree:

LoraError
├── ConfigError      a setting that cannot be (also a ValueError)
│   ├── SettingError a value that its field cannot have
│   └── FileError    what a configuration file states
├── TargetError      target_modules or modules_to_save do not fit the model
├── CheckpointError  an adapter's files do not fit, or could not be written
├── MergeError       merge, restore or disabled() cannot be done on this model as it stands
├── ContractError    a method breaks a clause of the contract (also an AssertionError)
├── ModelError       a base model or its tokenizer is not to be had
├── DataError        a data set cannot be read as asked
├── RunError         a run directory cannot be written, or is not what it should be
├── TrainingError    training cannot go on
└── StoppedError     a signal stopped a run, which is saved

A message says what was asked, what was found, and the next command.
"""

import shlex


def command(*words: object) -> str:
    """A command line to be pasted into a shell: a name that a shell would read, run or split is
    quoted."""
    return shlex.join(map(str, words))


class LoraError(Exception):
    """The root: `except LoraError` catches everything below and nothing else."""


class ConfigError(LoraError, ValueError):
    pass


class SettingError(ConfigError):
    """A value that a field cannot have. Python names the field, the command line the flag."""

    def __init__(self, field: str, reason: str) -> None:
        super().__init__(field, reason)
        self.field, self.reason = field, reason

    def __str__(self) -> str:
        return self.about(self.field)

    def about(self, name: str) -> str:
        """The message about the field by this name."""
        return f"{name} {self.reason} Set {name}."


class FileError(ConfigError):
    """What a configuration file states cannot be; keys are named as they are in the file."""


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
