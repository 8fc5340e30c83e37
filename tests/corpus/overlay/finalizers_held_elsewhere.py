import json
import json.decoder


class Loud:
    def __del__(self):
        print("finalized")


json.decoder.left = Loud()
json.decoder.file = open("/dev/stdout", "w")
json.decoder.file.write("written to the end\n")
