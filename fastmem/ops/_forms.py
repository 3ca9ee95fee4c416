"""The forms of sharpening and the small number each of them takes."""

FORMS = {"softmax": 1e-6, "power": 1e-16}


def resolve(form: str, eps: float | None) -> tuple[bool, float]:
    """Whether the form is the one in powers, and eps, or the form's own where it is None. Checks both."""
    if not isinstance(form, str) or form not in FORMS:
        raise ValueError(f"form: expected one of {', '.join(FORMS)}, got {form!r}")
    if eps is None:
        eps = FORMS[form]
    check(eps)
    return form == "power", float(eps)


def check(eps: float) -> None:
    """Checks eps. With 0, weights of 0 would divide by it."""
    if not isinstance(eps, int | float) or not 0 < eps < float("inf"):
        raise ValueError(f"eps: expected a finite number above 0, got {eps!r}")
