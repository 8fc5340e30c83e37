import json

json.kept = open("/dev/stdout", "w")
json.kept.write("written to the end\n")
