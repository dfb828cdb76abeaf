"""Can this machine run the course, and what does this error mean? As an IPython extension it defines `%explain`."""


def load_ipython_extension(shell) -> None:
    """Define `%explain` for errors to come."""
    from helpers.diagnosis import explain

    explain.register(shell)
