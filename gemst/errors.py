"""Errors a user can act on."""


class GemstError(Exception):
    """Something the user can mend: `cause` says what is wrong, `fix` says what to do about it.

    The command line prints both on one line and exits with status 1; nothing has been half-written by then.
    """

    def __init__(self, cause: str, fix: str = "") -> None:
        self.cause, self.fix = cause, fix
        super().__init__(f"{cause}. {fix}" if fix else cause)
