"""Every error this package raises on purpose; the message is one sentence: what came and what to do.

    PyEngineError
    ├── ConfigError (ValueError)    a setting, or a combination of settings, that cannot work
    ├── ShapeError (ValueError)     an array of the wrong shape or dtype
    ├── PromptError (ValueError)    an empty, over-long or unreadable prompt
    ├── InputError (ValueError)     a given image, video or snapshot that cannot be read
    ├── BundleError                 a bundle that is missing, damaged or made for another version
    ├── PlanError                   a plan that cannot be built or run
    ├── BackendUnavailable          a backend or device that this machine lacks; names the extra to install
    ├── OutputError                 an output file that cannot be written; what was written stays playable
    └── StreamClosed                a stream used after close()

Anything else that escapes is a bug of ours.
"""

__all__ = [
    "BackendUnavailable",
    "BundleError",
    "ConfigError",
    "InputError",
    "OutputError",
    "PlanError",
    "PromptError",
    "PyEngineError",
    "ShapeError",
    "StreamClosed",
]


class PyEngineError(Exception):
    """The parent of every error of this package: catch it to catch them all."""


class ConfigError(PyEngineError, ValueError):
    """A setting, or a combination of settings, that cannot work."""


class ShapeError(PyEngineError, ValueError):
    """An array of the wrong shape or dtype."""


class PromptError(PyEngineError, ValueError):
    """A prompt that is empty, too long or uses words the model does not know."""


class InputError(PyEngineError, ValueError):
    """A given image, video or snapshot that cannot be read."""


class BundleError(PyEngineError):
    """A bundle that is missing, damaged or of another format."""


class PlanError(PyEngineError):
    """A plan that cannot be built or run."""


class BackendUnavailable(PyEngineError):
    """A backend or device that this machine lacks."""


class OutputError(PyEngineError):
    """An output that cannot be written; what was written before stays playable."""


class StreamClosed(PyEngineError):
    """A stream that was used after it was closed."""
