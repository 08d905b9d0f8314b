"""Takes too long."""

import time

time.sleep(60)
