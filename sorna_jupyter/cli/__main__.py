import sys

from sorna_jupyter.cli import main

sys.exit(main())
