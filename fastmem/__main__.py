"""`python -m fastmem`: see fastmem/cli.py."""

import sys


def main() -> None:
    try:
        from fastmem.cli import app
    except ModuleNotFoundError as error:
        package = (error.name or "").split(".")[0]
        if package not in ("typer", "rich"):
            raise
        sys.exit(f"The command line needs {package}, which the extra cli brings: pip install {package}")
    app(prog_name="python -m fastmem")


if __name__ == "__main__":
    main()
