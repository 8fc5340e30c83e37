import looks_around

VALUE = 42
print(looks_around.FILE, looks_around.PATH, looks_around.NAME, looks_around.__main__.VALUE)
print(looks_around.ARGV)
