"""The exception that the command line turns into a message and exit code 2."""


class LlmqError(Exception):
    """An error that the user can fix: the message names the file or weight and the remedy, in a few lines at most."""


def first_line(error: BaseException) -> str:
    """The first line of an error's message; with the name of its class if it is one word, which alone says nothing.

    For the middle of a message that says what failed and the way out, never for the whole of one. Of a configuration
    that is not what its reader takes (pydantic), the first place and what is wrong there: the first line says neither.
    """
    if callable(details := getattr(error, "errors", None)):
        first = details()[0]
        # Names of pydantic's own validators have brackets.
        place = ".".join(str(at) for at in first["loc"] if "[" not in str(at))
        return f"{place}: {first['msg']}" if place else str(first["msg"])
    line = (str(error).strip().splitlines() or [""])[0].rstrip(" :")
    if " " in line or isinstance(error, LlmqError):
        return line
    return f"{type(error).__name__}: {line}" if line else type(error).__name__
