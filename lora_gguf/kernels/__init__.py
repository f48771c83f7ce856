"""What compiled code shares: the decorator, lanes, halves, sums in blocks. Numba's settings are those that work here.

Numba reads its environment when it is imported: a number of threads that is none ends it with a traceback, other values
that it cannot read are told with one. None of its threads is used here, and what it cannot read it ignores.
"""

from __future__ import annotations

import os
import re
import warnings

if not re.fullmatch(r"0*[1-9]\d{0,4}", os.environ.get("NUMBA_NUM_THREADS", "1"), re.ASCII):
    del os.environ["NUMBA_NUM_THREADS"]
warnings.filterwarnings("ignore", r"Environment variable 'NUMBA_", RuntimeWarning)
