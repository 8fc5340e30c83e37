import os
import random
import time
import uuid

PID, TIME, NUMBER, ID = os.getpid(), time.time_ns(), random.random(), uuid.uuid4()
