"""What went wrong, in one line that names the thing, the limit and the next step; and its exit code."""

from __future__ import annotations


class Ip2pError(Exception):
    """Base of every error that a user can cause; the command line prints it and exits with `code`."""

    code = 1


class InputError(Ip2pError):
    """A picture, instruction or option that cannot be used."""

    code = 2


class ModelError(Ip2pError):
    """A model that is missing, unreadable or of the wrong kind, or a network that is needed for it."""

    code = 3


class ResourceError(Ip2pError):
    """Memory, disk or time ran out."""

    code = 4


class Terminated(BaseException):
    """SIGTERM came. Not an Exception, so that no handler in between swallows it."""
