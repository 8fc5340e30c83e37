import sys

try:
    import no_such_module as codec
except ImportError as error:
    print(error)
    import json as codec

if sys.version_info < (3, 0):
    import no_such_module_either

print(codec.dumps({}), "json.decoder" in sys.modules)
