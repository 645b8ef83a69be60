"""`python -m fast` is the command `fast`."""

from __future__ import annotations

from fast.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
