try:
    while True:
        print(repr(input("? ")))
except EOFError as error:
    print("EOFError", error)
