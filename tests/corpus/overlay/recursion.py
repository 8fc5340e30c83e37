def deeper():
    return deeper()


try:
    deeper()
except RecursionError as error:
    print(type(error).__name__, error)
