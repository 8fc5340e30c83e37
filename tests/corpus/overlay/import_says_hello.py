import says_hello

print(says_hello.__name__)
