import json
import logging
import multiprocessing
import os
import random
import secrets
import tempfile
import threading
import uuid

from own.moment import ID, NUMBER, PID, TIME

things = {
    "random": random.random(),
    "secrets": secrets.token_hex(),
    "uuid1": str(uuid.uuid1()),
    "uuid4": str(uuid.uuid4()),
    "name of a temporary file": next(tempfile._get_candidate_names()),
    "what an own module made": str(ID),
    "what an own module drew": NUMBER,
    "process id": os.getpid(),
    "process id that an own module saw": PID,
    "native id of the main thread": threading.main_thread().native_id,
    "time that an own module saw": TIME,
    "start of the log": logging._startTime,
    "key of multiprocessing": bytes(multiprocessing.current_process().authkey).hex(),
}
print(json.dumps(things))
