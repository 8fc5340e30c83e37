import os
import select

epoll = select.epoll()
try:
    epoll.register(0, select.EPOLLIN)
except PermissionError as error:
    print(error)
else:
    while epoll.poll():
        data = os.read(0, 4096)
        print(data)
        if not data:
            break
