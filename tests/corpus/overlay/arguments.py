import os
import sys

print(sys.argv, getattr(sys, "orig_argv", None), sys.executable)
print(sys.path, os.getcwd(), sys.flags, sys.warnoptions, sys._xoptions)
