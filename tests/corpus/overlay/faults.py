import ctypes
import faulthandler

print(faulthandler.is_enabled())
faulthandler.enable()
ctypes.string_at(0)
