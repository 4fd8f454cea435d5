"""`python -m nanogpt_fast` is `nanogpt-fast`."""
import sys

from nanogpt_fast.cli import main

sys.exit(main())
