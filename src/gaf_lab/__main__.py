"""`python -m gaf_lab` is `gaf`."""

from gaf_lab.cli import main

raise SystemExit(main())
