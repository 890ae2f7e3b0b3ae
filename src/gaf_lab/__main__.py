"""`python -m gaf_lab` is `gaf`."""

from gaf_lab import main

raise SystemExit(main())
