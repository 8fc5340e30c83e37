import os

from own import moment
from own.moment import PID

print(os.getpid() == PID == moment.PID, moment.__name__, moment.__file__)
