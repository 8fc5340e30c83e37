import json
import starts_thread
import threading

starts_thread.asked.put(21)
print(json.dumps(starts_thread.answered.get()), threading.active_count())
