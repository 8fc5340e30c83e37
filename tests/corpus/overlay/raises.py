def divide(by):
    return 1 / by


try:
    divide(0)
except ZeroDivisionError as error:
    raise ValueError("no") from error
