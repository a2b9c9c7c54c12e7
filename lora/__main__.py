"""`python -m lora` is `lora`."""

import sys

from lora.cli import main

sys.exit(main())
