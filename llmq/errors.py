"""The exception that the command line turns into a message and exit code 2."""


class LlmqError(Exception):
    """An error that the user can fix: the message names the file or weight and the remedy, in a few lines at most."""


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or the name of its class if it has none."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
