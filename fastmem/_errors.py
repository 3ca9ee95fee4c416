"""Exceptions a user may want to catch. Bad arguments raise TypeError (dtype), ValueError (shape, device, value) or
NotImplementedError (a combination that no backend serves)."""


class ExtensionNotBuilt(ImportError):
    """The C++ extension is not part of this installation."""


class ExtensionMismatch(ImportError):
    """The C++ extension belongs to another version of fastmem, or to another Python or torch."""


class BackendUnavailable(RuntimeError):
    """A backend was asked for by name and cannot serve the call; the message says why."""
