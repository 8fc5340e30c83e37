import logging

logging.basicConfig(format="%(levelname)s %(name)s %(module)s %(processName)s %(threadName)s %(message)s", level=10)
logging.getLogger("corpus").info("hello %s", "world")
