import os
import stat
import sys

for stream in (sys.stdin, sys.stdout, sys.stderr):
    print(stream, stream.encoding, stream.errors, stream.line_buffering, stream.write_through, stream.newlines)
    print(stream.buffer, stream.isatty(), stream.fileno(), stream.readable(), stream.writable(), stream.seekable())
    print(oct(stat.S_IFMT(os.fstat(stream.fileno()).st_mode)), stream.closed, stream is getattr(sys, f"__{stream.name[1:-1]}__"))
