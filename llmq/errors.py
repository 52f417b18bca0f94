"""The one exception that the command line turns into a line of text and exit code 2."""


class LlmqError(Exception):
    """Something the user can mend: the message names the file or weight and the way out, in one line or a short list."""
