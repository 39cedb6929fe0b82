"""The one exception that a user is meant to read."""


class SoftCoTError(Exception):
    """A mistake that the user can mend: bad recipe, bad data, a cache of another model, a full disk.

    The message says what was wrong, the value found and what to do next. The command line prints it
    without a stack trace and exits with 2.
    """
