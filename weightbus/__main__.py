"""``python -m weightbus``."""

from weightbus.tools.cli import main

raise SystemExit(main())
