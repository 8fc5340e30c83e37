import threading

begun = threading.Event()


def work():
    begun.set()
    threading.Event().wait()
    print("never")


threading.Thread(target=work, daemon=True).start()
begun.wait()
print("ends")
