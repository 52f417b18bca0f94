"""The one exception that the command line turns into a line of text and exit code 2."""


class LlmqError(Exception):
    """Something the user can mend: the message names the file or weight and the way out, in a few lines at most."""


def first_line(error: BaseException) -> str:
    """What an error says in its first line, or its kind."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
