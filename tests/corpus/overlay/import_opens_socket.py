import opens_socket

opens_socket.ours.send(b"through the socket")
print(opens_socket.theirs.recv(100))
