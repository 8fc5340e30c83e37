print("never")
if:
