"""One wording for arguments out of range."""


def check(condition: bool, argument: str, expected: str, got: object) -> None:
    """Raise ``ValueError``, naming the argument, unless the condition holds; conditions are False for NaN."""
    if not condition:
        raise ValueError(f"Expected argument `{argument}` to be {expected} but got {got}")


def check_positive(**values: float) -> None:
    """Raise ``ValueError``, naming the argument, for the first that is not positive."""
    for name, value in values.items():
        check(value > 0, name, "positive", value)
