"""What the training scripts share. Nothing here imports a script."""


class UserError(Exception):
    """A user's mistake: one sentence that names the flag and the way out. Scripts print it and exit with code 2."""
