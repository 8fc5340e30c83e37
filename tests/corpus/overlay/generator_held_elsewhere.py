import json


def waiting():
    try:
        yield
    finally:
        print("finally")


json.kept = waiting()
next(json.kept)
